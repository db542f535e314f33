/* A figure that a narrow window makes too small to read opens at its own size, by a tap, by Enter or
   by the space bar, in a box that scrolls; Escape, the button or a second tap close it. */
(() => {
  const SMALLEST = 0.65; // of its size on a desk, at which a figure's words still have 11 pixels
  const box = document.createElement("dialog");
  if (!box.showModal) return;
  box.className = "enlarged";
  box.ariaLabel = "Figure, enlarged";
  const close = document.createElement("button");
  [close.type, close.textContent] = ["button", "Close"];
  close.addEventListener("click", () => box.close());

  function open(image) {
    const twin = image.cloneNode();
    for (const name of ["role", "tabindex", "aria-haspopup", "loading"]) twin.removeAttribute(name);
    twin.style.width = `${image.getAttribute("width")}px`;
    const room = document.createElement("div");
    [room.className, room.tabIndex] = ["enlarged-room", 0];
    room.append(twin);
    twin.addEventListener("click", () => box.close());
    box.replaceChildren(close, room);
    if (!box.isConnected) document.body.append(box);
    box.showModal();
  }

  function mark() {
    for (const image of document.querySelectorAll("article .cell_output img[width], article figure img[width]")) {
      const small = image.offsetWidth > 0 && image.offsetWidth < SMALLEST * image.getAttribute("width");
      if (small === image.hasAttribute("role")) continue;
      for (const [name, value] of [["role", "button"], ["tabindex", "0"], ["aria-haspopup", "dialog"]])
        if (small) image.setAttribute(name, value);
        else image.removeAttribute(name);
    }
  }

  const at = (e) => e.target.closest?.("article img[role=button]");
  document.addEventListener("click", (e) => at(e) && open(at(e)));
  document.addEventListener("keydown", (e) => {
    if (!at(e) || !["Enter", " "].includes(e.key)) return;
    e.preventDefault();
    open(at(e));
  });
  addEventListener("resize", mark);
  new MutationObserver(mark).observe(document.documentElement, { attributeFilter: ["data-theme"] });
  mark();
})();
