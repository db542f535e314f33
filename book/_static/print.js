/* Paper is white and has every figure: what is printed is the light page. A browser need not wait for
   figures once it prints, so the far ones are asked for as soon as anybody is there: with the first
   key, touch or movement of the mouse, without which nothing prints. What a page folds away, the
   answers to questions and the solutions of exercises, stands at the end of the paper. */
(() => {
  const root = document.documentElement.dataset;
  let theme, end;

  function load() {
    for (const image of document.querySelectorAll("img[loading=lazy]")) image.loading = "eager";
  }

  function make(tag, ...inside) {
    const e = document.createElement(tag);
    e.append(...inside);
    return e;
  }

  function copy(e) {
    const twin = e.cloneNode(true);
    for (const one of [twin, ...twin.querySelectorAll("[id]")]) one.removeAttribute("id");
    twin.querySelectorAll("button").forEach((button) => button.remove());
    twin.classList.remove("dropdown", "toggle", "toggle-hidden"); // a fold no more
    return twin;
  }

  function answers() {
    const questions = [...document.querySelectorAll("article li:has(> [role=group] > details)")];
    const solutions = [...document.querySelectorAll("article .solution.admonition")];
    if (!questions.length && !solutions.length) return;
    end = make("section", make("h2", "Answers and solutions"));
    end.className = "paper-end";
    const list = make("ol");
    for (const question of questions) {
      const item = make("li");
      for (const option of question.querySelectorAll(":scope > [role=group] > details")) {
        const said = make("b", ...copy(option.querySelector(".sd-summary-text")).childNodes);
        const [first, ...rest] = copy(option.querySelector(".sd-card-body")).children;
        first?.prepend(said, ": ");
        item.append(first ?? said, ...rest);
      }
      list.append(item);
    }
    if (questions.length) end.append(list);
    end.append(...solutions.map(copy));
    document.querySelector("article").append(end);
    root.paper = "";
  }

  for (const sign of ["keydown", "pointerdown", "pointermove"])
    addEventListener(sign, load, { once: true, passive: true });
  addEventListener("beforeprint", () => {
    load();
    theme = root.theme;
    root.theme = "light";
    answers();
  });
  addEventListener("afterprint", () => {
    root.theme = theme;
    end?.remove();
    delete root.paper;
  });
})();
