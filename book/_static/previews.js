/* Show what a link leads to, beside it, for a mouse that rests on it and for the keyboard's focus:
   definitions and references from the link's title, formulas and figures of this page, formulas
   of other pages from the templates of _ext/previews.py. Escape closes it; touch opens none. */
(() => {
  const box = document.createElement("div");
  if (!box.showPopover) return;
  Object.assign(box, { id: "preview", role: "tooltip", popover: "manual" });
  let link, title, timer, dismissed;

  function contents(a) {
    if (a.title) return document.createTextNode(a.title);
    const other = `template[data-preview="${CSS.escape(a.getAttribute("href"))}"]`;
    let source = document.querySelector(other)?.content;
    if (a.hash && a.pathname === location.pathname) {
      const target = document.getElementById(decodeURIComponent(a.hash.slice(1)));
      if (target?.matches("div.math")) source = target.querySelector(".katex-display");
      if (target?.matches("figure")) source = target;
    }
    if (!source) return null;
    const copy = document.createElement("div");
    copy.append(source.cloneNode(true));
    copy.querySelectorAll(".headerlink").forEach((e) => e.remove());
    copy.querySelectorAll("a").forEach((e) => e.replaceWith(...e.childNodes));
    copy.querySelectorAll("[id]").forEach((e) => e.removeAttribute("id"));
    return copy;
  }

  function hide() {
    clearTimeout(timer);
    if (!link) return;
    box.hidePopover();
    link.removeAttribute("aria-describedby");
    if (title) link.title = title;
    link = null;
  }

  function show(a) {
    clearTimeout(timer);
    if (a === link) return;
    hide();
    const shown = contents(a);
    if (!shown) return;
    [link, title] = [a, a.title];
    a.removeAttribute("title");
    a.setAttribute("aria-describedby", box.id);
    box.replaceChildren(shown);
    // Spoken, a formula's source says more than its symbols one after the other.
    box.ariaLabel = box.querySelector(".katex-display annotation")?.textContent ?? null;
    if (!box.isConnected) {
      const article = a.closest("article");
      article.append(box);
      // Far blocks are laid out when they come near, and move the link.
      new ResizeObserver(() => link && place()).observe(article);
    }
    box.showPopover();
    place();
  }

  function place() {
    // Below the link, or above it where there is more room; never on it. The box keeps inside the
    // window whatever becomes of its size, because percentages of a translation are its own.
    const at = link.getBoundingClientRect();
    box.style.maxHeight = "";
    const room = innerHeight - at.bottom;
    const above = room < box.offsetHeight + 16 && at.top > room;
    const width = document.documentElement.clientWidth;
    const left = Math.max(8, at.left);
    box.style.maxHeight = `${(above ? at.top : room) - 16}px`;
    box.style.left = `${scrollX + left}px`;
    box.style.top = `${scrollY + (above ? at.top - 8 : at.bottom + 8)}px`;
    box.style.translate = `min(0px, ${width - left - 8}px - 100%) ${above ? "-100%" : "0"}`;
  }

  const leave = () => link?.matches(":focus-visible") || hide();
  const linkAt = (e) => e.target.closest?.("article a.reference.internal");

  document.addEventListener("pointerover", (e) => {
    if (e.pointerType === "touch") return;
    const a = linkAt(e);
    clearTimeout(timer);
    if (a !== dismissed) dismissed = null;
    if (a && a !== dismissed) timer = setTimeout(show, 200, a);
    else if (!a && link && !box.contains(e.target)) timer = setTimeout(leave, 300);
  });
  document.addEventListener("pointerdown", (e) => box.contains(e.target) || hide());
  document.addEventListener("focusin", (e) => {
    const a = linkAt(e);
    if (!a?.matches(":focus-visible")) return;
    a.scrollIntoView({ block: "nearest", behavior: "instant" }); // or it would move from its place
    show(a);
  });
  document.addEventListener("focusout", hide);
  document.addEventListener("scroll", () => {
    // What is gone from the window leaves nothing behind that would cover what has come.
    const { top, bottom } = link?.getBoundingClientRect() ?? {};
    if (bottom < 0 || top > innerHeight) hide();
  }, { passive: true });
  document.addEventListener("keydown", (e) => {
    if (e.key !== "Escape") return;
    dismissed = link;
    hide();
  });
})();
