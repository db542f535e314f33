// The axis explorer: pick a norm and a cell, and see which cells share its mean and variance.
// No dependencies. `mount(root)` serves a page, `export default { render }` serves anywidget.
const EPS = 1e-5;
const AXES = ["N", "C", "H", "W"];
const LIMITS = { N: 4, C: 6, H: 4, W: 4 };
// For every choice: its name, the mean's index, what is summed over, and the axes' numbers.
const NORMS = {
  batch: ["Batch norm", "c", "{N} · {H} · {W}", "0, 2, 3"],
  layer: ["Layer norm", "n", "{C} · {H} · {W}", "1, 2, 3"],
  instance: ["Instance norm", "nc", "{H} · {W}", "2, 3"],
  group: ["Group norm", "ng", "{H} · {W} and the {C}/G channels of g", "2, 3, 4"],
  pixel: ["Mistake: a mean per pixel", "chw", "{N}", "0,"],
  broadcast: ["Mistake: x - mean, along W", "c", "{N} · {H} · {W}", "0, 2, 3"],
};
// 2 x 3 x 8 x 8 bytes in steps of 7, N C H W: flower and astronaut of bnlib.book.datasets.photographs().
const PHOTO =
  "11000111003aa30108uxxp100lwsuw700nvrsv901dtuuq2001fkjb00003dqt81647aa665737cb799bbnlmk5cbiiadl999hh8akb76djfhj8824cggca9225elne6547bd444736aa488c9fcdd4cdd945d79ab844b8758b89c55238aa8871128efd6cqqopukn9qnritjpiqgqtvjroqc3hulonxqglp66uvrspgd4rspqh43aktmpa244bpplnshm7pkngshpanfmsuiqiea3ftln9gca9h66keffh9d4dcdcb4397eed8244donhmselbohjdrfpcmfirthpica2ftlm8b886e56j8gbf7c4a7f9943959da7244";

const size = (s) => AXES.map((a) => s[a]);
const index = ([n, c, h, w], s) => ((n * s.C + c) * s.H + h) * s.W + w;
const upTo = (k) => [...Array(k).keys()].map((i) => i + 1);
const divisors = (c) => upTo(c).filter((g) => c % g === 0);
const clamp = (v, low, high) => Math.min(Math.max(v, low), high);

// The numbers: the tensor of the question for its own shape, else small integers.
function values(s) {
  if (s.data === "photo")
    return [...PHOTO.slice(0, s.N * 192)].map((digit) => parseInt(digit, 36) * 7);
  if (size(s).every((d) => d === 2)) return [1, 0, 0, 0, 0, 1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7];
  const all = s.N * s.C * s.H * s.W;
  return [...Array(all)].map((_, i) => ((i * i * 7 + i * 5 + 3) % 11) + (i % s.W));
}

// The cells that enter the mean subtracted from the cell `at`, and the cells it is subtracted from:
// for every axis, from where to where.
function boxes(s) {
  const [n, c, h, w] = s.at.map((i) => [i, i]);
  const [N, C, H, W] = size(s).map((d) => [0, d - 1]);
  const first = s.at[1] - (s.at[1] % (s.C / s.G));
  const mean = {
    batch: [N, c, H, W],
    layer: [n, C, H, W],
    instance: [n, c, H, W],
    group: [n, [first, first + s.C / s.G - 1], H, W],
    pixel: [N, c, h, w],
    broadcast: [N, s.C === 1 ? C : w, H, W],
  }[s.norm];
  return [mean, s.norm === "broadcast" ? [N, C, H, s.C === 1 ? W : w] : mean];
}

const inside = (box, q) => box.every(([low, high], i) => low <= q[i] && q[i] <= high);
const rgb = (channel) => `rgb(${[0, 1, 2].map(channel)})`;
const words = (box, s) =>
  box
    .map(([low, high], i) => {
      const a = "nchw"[i];
      if (low === high) return `${a}=${low}`;
      return high - low + 1 === size(s)[i] ? `every ${a}` : `${a}=${low} to ${high}`;
    })
    .join(", ");
const place = (at) => words(at.map((i) => [i, i]));

// The one case in which NumPy and PyTorch refuse, or return another shape.
const misfit = (s) => s.norm === "broadcast" && s.C !== 1 && s.C !== s.W;

function statistics(s, x, cells) {
  const picked = cells.map((q) => x[index(q, s)]);
  const mean = picked.reduce((a, b) => a + b, 0) / picked.length;
  const variance = picked.reduce((a, b) => a + (b - mean) ** 2, 0) / picked.length;
  const value = x[index(s.at, s)];
  return { count: picked.length, mean, variance, value, y: (value - mean) / Math.sqrt(variance + EPS) };
}

function code(s) {
  const axes = NORMS[s.norm][3];
  const five = [s.N, s.G, s.C / s.G, s.H, s.W].join(", ");
  const call = "y = torch.nn.functional.";
  return [
    `# x.shape == (${size(s).join(", ")}): N, C, H, W`,
    ...{
      batch: [
        `mean = x.mean(axis=(${axes}))`,
        "y, cache = bnlib.batch_norm_forward(x)",
        `${call}batch_norm(x, None, None, training=True)`,
      ],
      layer: [`mean = x.mean(axis=(${axes}))`, `${call}layer_norm(x, x.shape[1:])`],
      instance: [`mean = x.mean(axis=(${axes}))`, `${call}instance_norm(x)`],
      group: [`mean = x.reshape(${five}).mean(axis=(${axes}))`, `${call}group_norm(x, ${s.G})`],
      pixel: [`mean = x.mean(axis=(${axes}))  # not batch norm`],
      broadcast: [
        `mean = x.mean(axis=(${axes}))  # shape (C,)`,
        "x - mean  # lines up with W, not with C",
        "x - bnlib.per_channel(mean, 4)  # the cure",
      ],
    }[s.norm],
  ].join("\n");
}

const show = (v) => Number(v.toFixed(3)).toString().replace("-", "−");

// A link's fragment is made of words: a norm, "photo", lengths (N2) and the cell (n0).
function fromLink(text) {
  const [head, ...words] = text.split("-");
  if (head !== "#explore") return null;
  const s = { norm: "batch", data: "numbers", N: 2, C: 2, H: 2, W: 2, G: 1, at: [0, 0, 0, 0] };
  for (const word of words) {
    const [, key, digits] = /^([NCHWGnchw])(\d{1,3})$/.exec(word) || [];
    if (key > "Z") s.at["nchw".indexOf(key)] = +digits;
    else if (key) s[key] = +digits;
    else if (word === "photo") s.data = word;
    else if (Object.hasOwn(NORMS, word)) s.norm = word;
  }
  return settle(s);
}

const toLink = (s) =>
  ["#explore", s.norm + (s.data === "photo" ? "-photo" : ""), ...[...AXES, "G"].map((a) => a + s[a]), ...s.at.map((v, i) => "nchw"[i] + v)].join("-");

// Brings every number back into its range, so that a link cannot ask for an impossible state.
function settle(s) {
  const photo = s.data === "photo";
  if (photo) Object.assign(s, { C: 3, H: 8, W: 8 });
  else for (const a of AXES) s[a] = clamp(s[a], 1, LIMITS[a]);
  s.N = clamp(s.N, 1, photo ? 2 : LIMITS.N);
  s.G = divisors(s.C).findLast((g) => g <= s.G) || 1;
  s.at = AXES.map((a, i) => clamp(s.at[i] || 0, 0, s[a] - 1));
  return s;
}

// `data-start` of the root is the fragment to begin with.
function mount(root) {
  const s = fromLink(root.dataset.start || "#explore");
  root.replaceChildren();
  root.dataset.ready = "";
  root.role = "region";
  root.ariaLabel = "Axis explorer: which cells share one mean";
  const add = (parent, tag, attrs = {}, text = "") => {
    const el = parent.appendChild(document.createElement(tag));
    for (const [k, v] of Object.entries(attrs)) el.setAttribute(k, v);
    el.textContent = text;
    // JupyterLab would take a letter typed in a menu for a command, such as "delete this cell".
    el.dataset.lmSuppressShortcuts = "";
    return el;
  };
  // Text in which {N} is an axis, {_c} an index, and any other {name} a number.
  const write = (el, text, numbers) => {
    el.replaceChildren();
    text.split(/[{}]/).forEach((part, i) => {
      if (i % 2 === 0) el.append(part);
      else if (part[0] === "_") add(el, "sub", {}, part.slice(1));
      else if (AXES.includes(part)) add(el, "b", { class: `ax-${part}` }, part);
      else add(el, "b", { "data-of": part }, show(numbers[part]));
    });
  };

  const bar = add(root, "div", { class: "ax-bar", role: "group", "aria-label": "What to show" });
  const inputs = {};
  const choice = (key, label) => {
    const select = add(add(bar, "label", { class: `ax-${key}` }, label), "select", { name: key });
    inputs[key] = select;
    select.onchange = () => {
      s[key] = +select.value || select.value;
      if (s[key] === "numbers") Object.assign(s, { C: 2, H: 2, W: 2 });
      settle(s);
      build();
    };
  };
  const fill = (key, options) => {
    inputs[key].replaceChildren();
    for (const v of options) add(inputs[key], "option", { value: v }, NORMS[v]?.[0] || v);
    inputs[key].value = s[key];
    inputs[key].disabled = options.length < 2;
  };
  choice("norm", "Norm");
  choice("data", "Values");
  for (const a of AXES) choice(a, a);
  choice("G", "Groups G");
  add(bar, "p", {}, "Touch a cell or use arrow keys.");

  const formula = add(root, "p", { class: "ax-formula" });
  const live = add(root, "p", { class: "ax-live", "aria-live": "polite", "aria-atomic": "true" });
  const view = add(root, "div", { class: "ax-view" });
  const grid = add(view, "div", {
    class: "ax-grid",
    role: "grid",
    "aria-multiselectable": "true",
    "aria-label": "Cells, selected if in the mean",
  });
  const side = add(view, "div", { class: "ax-side" });
  const picture = add(side, "canvas", {
    role: "img",
    "aria-label": "Photographs and their planes: whole pixels are in the mean",
  });
  const caption = add(side, "p");
  const lines = add(root, "pre", { class: "ax-code", tabindex: "0", role: "group", "aria-label": "The same in code" });
  const link = add(add(root, "p", { class: "ax-foot" }), "a", {}, "Link to this view");
  let cells = [];
  let x = [];

  function build() {
    const photo = s.data === "photo";
    fill("norm", Object.keys(NORMS));
    fill("data", ["numbers", "photo"]);
    for (const a of AXES) fill(a, !photo ? upTo(LIMITS[a]) : a === "N" ? [1, 2] : [s[a]]);
    fill("G", divisors(s.C));
    inputs.G.parentNode.style.display = s.norm === "group" ? "" : "none";
    x = values(s);
    grid.replaceChildren();
    grid.classList.toggle("ax-photo", photo);
    // How many cells it is wide and high, with the gaps, so that all of it is seen at once.
    grid.style = `--w: ${s.W}; --cols: ${s.N * (s.W + 0.4)}; --rows: ${s.C * (s.H + 0.25) + 1}`;
    cells = [];
    const head = add(grid, "div", { role: "row" });
    add(head, "span", { class: "ax-C" });
    for (let n = 0; n < s.N; n++)
      add(head, "span", { role: "columnheader", "aria-colspan": s.W, class: "ax-N" }, `n=${n}`);
    for (let c = 0; c < s.C; c++)
      for (let h = 0; h < s.H; h++) {
        const row = add(grid, "div", { role: "row", class: h ? "" : "ax-gap" });
        // The eye gets the first word, once for a channel; the style sheet pushes the others out.
        add(row, "span", { role: "rowheader", class: "ax-C" }, `${photo ? "RGB"[c] : "c=" + c} h=${h}`).style.textIndent = h ? "9em" : 0;
        for (let n = 0; n < s.N; n++)
          for (let w = 0; w < s.W; w++) {
            const v = x[index([n, c, h, w], s)];
            const cell = add(row, "span", { role: "gridcell" }, photo ? "" : v);
            if (photo) cell.style.background = rgb((k) => (k === c ? v : 0));
            cells.push(Object.assign(cell, { at: [n, c, h, w], value: v }));
            if (n && !w) cell.classList.add("ax-gap");
          }
      }
    paint();
  }

  function paint(focus) {
    const refused = misfit(s);
    const wrong = s.norm === "broadcast";
    const [mean, dots] = boxes(s);
    const lit = [];
    for (const cell of cells) {
      const on = !refused && inside(mean, cell.at);
      const dotted = wrong && !refused && inside(dots, cell.at);
      const me = place(cell.at) === place(s.at);
      if (on) lit.push(cell.at);
      cell.classList.toggle("ax-lit", on);
      cell.classList.toggle("ax-dot", dotted);
      cell.classList.toggle("ax-me", me);
      cell.ariaSelected = on;
      cell.ariaLabel = `${cell.value} at ${place(cell.at)}` + (on ? ", in the mean" : "") + (dotted ? ", dotted" : "");
      cell.tabIndex = me ? 0 : -1;
      if (me && focus) cell.focus();
    }
    link.href = toLink(s);
    lines.textContent = code(s);
    const [name, sub, over, axes] = NORMS[s.norm];
    write(formula, `${name}: μ{_${sub}} = mean over ${over}, axis=(${axes.replaceAll(" ", "\u00a0")})` + (wrong ? ", but x − μ subtracts μ{_w}" : ""));
    const t = refused || statistics(s, x, lit);
    const one = t.count === 1;
    const shares = wrong ? "in the mean" : one ? "has its own mean" : "share one mean";
    write(
      live,
      `Cell ${place(s.at)}: ` +
        (refused
          ? `a mean of length C = ${s.C} does not fit W = ${s.W}: x - mean ${s.W > 1 ? "raises an error" : "has another shape"}. Try W=C.`
          : `{count} cell${one ? "" : "s"} ${shares}: ${words(mean, s)}` +
            (s.norm === "group" ? ` (group ${(mean[1][0] * s.G) / s.C} of ${s.G})` : "") +
            (wrong ? `. Subtracted from this and all dotted cells: ${words(dots, s)}` : "") +
            `. Mean {mean}, variance {variance}. Output ({value} − ${show(t.mean)}) / √(${show(t.variance)} + 10⁻⁵) = {y}.`),
      t,
    );

    // The same norm on photographs: the colours, then one plane for each channel.
    const p = settle({ ...s, data: "photo" });
    const bytes = values(p);
    const same = !misfit(p) && boxes(p)[0];
    Object.assign(picture, { width: p.N * 27 - 3, height: 105 });
    const pen = picture.getContext("2d");
    for (let n = 0; n < p.N; n++)
      for (let k = 0; k < 4; k++)
        for (let h = 0; h < 8; h++)
          for (let w = 0; w < 8; w++) {
            const less = !k || (same && inside(same, [n, k - 1, h, w])) ? 0 : 1;
            pen.fillStyle = rgb((c) => (k && c !== k - 1 ? 0 : bytes[index([n, c, h, w], p)]));
            pen.fillRect(n * 27 + w * 3 + less, k * 27 + h * 3 + less, 3 - 2 * less, 3 - 2 * less);
          }
    caption.textContent = `Photographs, shape (${size(p).join(", ")})${s.norm === "group" ? ", G=" + p.G : ""}: ${same ? words(same, p) : "x - mean raises an error"}.`;
  }

  const go = (at) => {
    s.at = at;
    paint(true);
  };
  const under = (e) => e.target.closest("[role=gridcell]");
  grid.onclick = (e) => under(e) && go(under(e).at);
  // Not pointerover: that also comes when the page scrolls under a mouse at rest.
  grid.onpointermove = (e) => {
    if (e.pointerType !== "mouse" || !under(e) || under(e).tabIndex === 0) return;
    s.at = under(e).at;
    paint(grid.contains(document.activeElement));
  };
  grid.onkeydown = (e) => {
    const [n, c, h, w] = s.at;
    const all = e.ctrlKey ? 99 : 0;
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0], Home: [-all, -99], End: [all, 99] }[e.key];
    if (!step) return;
    e.preventDefault();
    const row = clamp(c * s.H + h + step[0], 0, s.C * s.H - 1);
    const col = clamp(n * s.W + w + step[1], 0, s.N * s.W - 1);
    go([Math.floor(col / s.W), Math.floor(row / s.H), row % s.H, col % s.W]);
  };
  const follow = () => {
    const asked = fromLink(location.hash);
    if (!asked || toLink(asked) === toLink(s)) return;
    Object.assign(s, asked);
    build();
    root.scrollIntoView();
  };
  addEventListener("hashchange", follow);
  build();
  follow();
  return () => removeEventListener("hashchange", follow);
}

export default { render: ({ el }) => (el.classList.add("axis-explorer"), mount(el)) };
