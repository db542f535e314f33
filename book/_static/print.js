/* Paper is white and has every figure: what is printed is the light page. A browser need not wait for
   figures once it prints, so the far ones are asked for as soon as anybody is there: with the first
   key, touch or movement of the mouse, without which nothing prints. */
(() => {
  const root = document.documentElement.dataset;
  let theme;

  function load() {
    for (const image of document.querySelectorAll("img[loading=lazy]")) image.loading = "eager";
  }

  for (const sign of ["keydown", "pointerdown", "pointermove"])
    addEventListener(sign, load, { once: true, passive: true });
  addEventListener("beforeprint", () => {
    load();
    theme = root.theme;
    root.theme = "light";
  });
  addEventListener("afterprint", () => {
    root.theme = theme;
  });
})();
