/* Paper is white and has every figure: what is printed is the light page. A browser need not wait for
   figures once it prints, so they are asked for as soon as a reader seems about to. */
(() => {
  const root = document.documentElement.dataset;
  let theme;

  function load() {
    for (const image of document.querySelectorAll("img[loading=lazy]")) image.loading = "eager";
  }

  document.addEventListener("keydown", (e) => (e.ctrlKey || e.metaKey) && load());
  document.querySelector(".dropdown-download-buttons")?.addEventListener("click", load);
  addEventListener("beforeprint", () => {
    load();
    theme = root.theme;
    root.theme = "light";
  });
  addEventListener("afterprint", () => {
    root.theme = theme;
  });
})();
