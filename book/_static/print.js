/* Paper is white and has every figure: what is printed is the light page. A browser need not wait for
   figures once it prints, so the far ones are asked for when the page has been open for a while, and
   at once when a key begins what may be a shortcut. */
(() => {
  const root = document.documentElement.dataset;
  let theme;

  function load() {
    for (const image of document.querySelectorAll("img[loading=lazy]")) image.loading = "eager";
  }

  document.addEventListener("keydown", (e) => (e.ctrlKey || e.metaKey) && load());
  addEventListener("load", () => setTimeout(load, 2000));
  addEventListener("beforeprint", () => {
    load();
    theme = root.theme;
    root.theme = "light";
  });
  addEventListener("afterprint", () => {
    root.theme = theme;
  });
})();
