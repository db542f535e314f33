// The axis explorer: every set of cells that shares one mean has its colour; touch a cell for its numbers.
// No dependencies. `mount(root)` serves a page, `export default { render }` serves anywidget.
const EPS = 1e-5;
const AXES = ["N", "C", "H", "W"];
const LIMITS = { N: 4, C: 6, H: 4, W: 4 };
// For every choice: its two words, who has a mean (axes in braces), and the axes' numbers.
const OVER = "over all {N samples}, {H rows} and {W columns}";
const NORMS = {
  batch: ["Batch", "norm", `Each {C channel} has one mean, ${OVER}`, "0, 2, 3"],
  layer: ["Layer", "norm", "Each {N sample} has one mean, over all {C channels}, {H rows} and {W columns}", "1, 2, 3"],
  instance: ["Instance", "norm", "Each {C channel} of each {N sample} has one mean, over {H rows} and {W columns}", "2, 3"],
  group: ["Group", "norm", "Each {N sample} has one mean for every {C *}, over {H rows} and {W columns}", "2, 3, 4"],
  pixel: ["Per pixel", "mistake", "Each pixel of each {C channel} has its own mean, over the {N samples} alone", "0,"],
  broadcast: ["Along W", "mistake", "Each {C channel} has one mean, but x − mean subtracts it from a {W column}", "0, 2, 3"],
};
const HUES = [250, 65, 155, 345, 105, 300, 205, 28];
// 2 x 3 x 7 x 7 bytes in steps of 7, N C H W: flower and astronaut of bnlib.book.datasets.photographs().
const PHOTO =
  "110021102djc100lxwx900ttqwh11outub007mqk10015ipb1549b77674ehc7abilhm9balc7hf77igcid838gih99227ikg7549d64584ac959ddb8e6bbd538a77b86a9626aba66113dde6ernmtmocrqmtkqlnchvpqouc9sghsvtpr91urnr54bnsqk345dplksjn9qniriqcjafuopdf87lfgffeee81gbeh34b8dee345foigrgncpjfqhqdj9etoodb77jffd9baa81c8hd33b69bc345";

const size = (s) => AXES.map((a) => s[a]);
const index = ([n, c, h, w], s) => ((n * s.C + c) * s.H + h) * s.W + w;
const upTo = (k) => [...Array(k).keys()].map((i) => i + 1);
const divisors = (c) => upTo(c).filter((g) => c % g === 0);
const clamp = (v, low, high) => Math.min(Math.max(v, low), high);
const show = (v, digits = 3) => Number(v.toFixed(digits)).toString().replace("-", "−");
const many = (k, word) => `${k} ${word}${k === 1 ? "" : "s"}`;
const place = (q) => q.map((v, i) => `${"nchw"[i]}=${v}`).join(", ");

// The numbers: the tensor of the question for its own shape, else small integers, higher in some channels.
function values(s) {
  if (s.data === "photo") return [...PHOTO.slice(0, s.N * 147)].map((digit) => parseInt(digit, 36) * 7);
  if (size(s).every((d) => d === 2)) return [1, 0, 0, 0, 0, 1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7];
  return cellsOf(s).map((q, i) => ((Math.imul(i + 11, 2654435761) >>> 28) % 6) + (q[1] % 4));
}

// The number of the mean that is subtracted from a cell, and of the mean that the cell enters: but for
// the second mistake the same.
const taken = (s, [n, c, h, w]) =>
  ({ batch: c, layer: n, instance: n * s.C + c, group: n * s.G + Math.floor((c * s.G) / s.C), pixel: (c * s.H + h) * s.W + w, broadcast: s.C === 1 ? 0 : w })[s.norm];
const enters = (s, q) => (s.norm === "broadcast" ? q[1] : taken(s, q));

// The one case in which NumPy and PyTorch refuse, or return another shape.
const misfit = (s) => s.norm === "broadcast" && s.C !== 1 && s.C !== s.W;

function cellsOf(s) {
  const all = [];
  for (let n = 0; n < s.N; n++)
    for (let c = 0; c < s.C; c++)
      for (let h = 0; h < s.H; h++) for (let w = 0; w < s.W; w++) all.push([n, c, h, w]);
  return all;
}

// Count, mean and variance of every group.
function statistics(s, x) {
  const groups = [];
  for (const q of cellsOf(s)) (groups[enters(s, q)] ||= []).push(x[index(q, s)]);
  return groups.map((group) => {
    const mean = group.reduce((a, b) => a + b, 0) / group.length;
    return { count: group.length, mean, variance: group.reduce((a, b) => a + (b - mean) ** 2, 0) / group.length };
  });
}

function code(s) {
  const axes = NORMS[s.norm][3];
  const five = [s.N, s.G, s.C / s.G, s.H, s.W].join(", ");
  const mean = `mean = x.mean(axis=(${axes}))`;
  return [
    `x.shape  # (${size(s).join(", ")})`,
    ...{
      batch: [mean, "y = F.batch_norm(x, None, None, training=True)"],
      layer: [mean, "y = F.layer_norm(x, x.shape[1:])"],
      instance: [mean, "y = F.instance_norm(x)"],
      group: [`mean = x.reshape(${five}).mean(axis=(${axes}))`, `y = F.group_norm(x, ${s.G})`],
      pixel: [mean + "  # not batch norm"],
      broadcast: [mean, "x - mean  # lines up with W, not with C", "x - bnlib.per_channel(mean, 4)  # the cure"],
    }[s.norm],
  ].join("\n");
}

// A link's fragment is made of words: a norm, "photo", "after", lengths (N2) and the cell (n0), if any.
function fromLink(text) {
  const [head, ...words] = text.split("-");
  if (head !== "#explore") return null;
  const s = { norm: "batch", data: "numbers", when: "before", N: 2, C: 4, H: 2, W: 4, G: 2, at: null };
  for (const word of words) {
    const [, key, digits] = /^([NCHWGnchw])(\d{1,3})$/.exec(word) || [];
    if (key > "Z") (s.at ||= [0, 0, 0, 0])["nchw".indexOf(key)] = +digits;
    else if (key) s[key] = +digits;
    else if (word === "photo") s.data = word;
    else if (word === "after") s.when = word;
    else if (Object.hasOwn(NORMS, word)) s.norm = word;
  }
  return settle(s);
}

const toLink = (s) =>
  ["#explore", s.norm, ...[s.data, s.when].filter((word) => /photo|after/.test(word)), ...[...AXES, "G"].map((a) => a + s[a]), ...(s.at || []).map((v, i) => "nchw"[i] + v)].join("-");

// Brings every number back into its range, so that a link cannot ask for an impossible state.
function settle(s) {
  const photo = s.data === "photo";
  if (photo) Object.assign(s, { C: 3, H: 7, W: 7 });
  else for (const a of AXES) s[a] = clamp(s[a], 1, LIMITS[a]);
  s.N = clamp(s.N, 1, photo ? 2 : LIMITS.N);
  s.G = divisors(s.C).findLast((g) => g <= s.G) || 1;
  s.at &&= AXES.map((a, i) => clamp(s.at[i], 0, s[a] - 1));
  return s;
}

// `data-start` of the root is the fragment to begin with.
function mount(root) {
  const s = fromLink(root.dataset.start || "#explore");
  const serial = `ax${document.querySelectorAll(".axis-explorer[data-ready]").length}`;
  root.replaceChildren();
  root.dataset.ready = "";
  root.role = "figure";
  root.ariaLabel = "Axis explorer: which cells share one mean";
  const add = (parent, tag, attrs = {}, text = "") => {
    const el = parent.appendChild(document.createElement(tag));
    for (const [k, v] of Object.entries(attrs)) el.setAttribute(k, v);
    el.textContent = text;
    // JupyterLab would take a letter typed in a menu for a command, such as "delete this cell".
    el.dataset.lmSuppressShortcuts = "";
    return el;
  };
  // Text in which {N samples} is a word in the colour of an axis, and {mean} a number.
  const write = (el, text, numbers) => {
    el.replaceChildren();
    text.split(/[{}]/).forEach((part, i) => {
      if (i % 2 === 0) el.append(part);
      else if (part[1] === " ") add(el, "b", { class: `ax-${part[0]}` }, part.slice(2));
      else add(el, "b", { "data-of": part }, show(numbers[part]));
    });
  };
  const change = (key, value) => {
    s[key] = value;
    if (key === "norm" && value === "group" && s.G === 1) s.G = divisors(s.C)[1] || 1;
    if (value === "numbers") Object.assign(s, { C: 4, H: 2, W: 4, G: 2 });
    if (value === "photo") s.G = 3;
    if (key === "data") s.at = null;
    settle(s);
    build();
  };
  const radios = (parent, key, label, options) => {
    const set = add(parent, "div", { class: `ax-set ax-${key}`, role: "radiogroup", "aria-label": label });
    for (const [value, ...texts] of options) {
      const one = add(set, "label", { class: `ax-${texts[1]}` });
      const input = add(one, "input", { type: "radio", name: serial + key, value });
      input.onchange = () => change(key, value);
      texts.forEach((text) => add(one, "span", {}, text));
    }
  };

  radios(root, "norm", "Norm", Object.entries(NORMS).map(([key, [first, second]]) => [key, first, second]));
  const says = add(root, "p", { class: "ax-says", role: "status" });
  const stage = add(root, "div", { class: "ax-stage" });
  const grid = add(stage, "div", { class: "ax-grid", role: "grid", "aria-multiselectable": "true", "aria-label": "Cells; arrow keys choose one, and its group is selected" });
  const slide = add(stage, "p", { class: "ax-slide" }, "← more cells: slide sideways →");
  const live = add(stage, "div", { class: "ax-card", "aria-live": "polite", "aria-atomic": "true" });
  const lines = add(stage, "pre", { class: "ax-code", tabindex: "0", role: "group", "aria-label": "The same in code" });
  const foot = add(root, "div", { class: "ax-foot" });
  radios(foot, "data", "Values", [["numbers", "Numbers"], ["photo", "Photos"]]);
  radios(foot, "when", "Values before or after the norm", [["before", "Before"], ["after", "After"]]);
  const more = add(foot, "details");
  add(more, "summary", {}, "Sizes");
  const menus = {};
  for (const a of [...AXES, "G"]) {
    menus[a] = add(add(more, "label", { class: `ax-${a}` }, a), "select", { name: a });
    menus[a].onchange = () => change(a, +menus[a].value);
  }
  const link = add(more, "a", {}, "Link to this view");
  let cells = [];
  let x = [];
  let over = null; // the cell under the mouse

  function build() {
    const photo = s.data === "photo";
    over = null;
    for (const key of ["norm", "data", "when"]) root.querySelector(`.ax-${key} [value=${s[key]}]`).checked = true;
    for (const a of [...AXES, "G"]) {
      const options = a === "G" ? divisors(s.C) : !photo ? upTo(LIMITS[a]) : a === "N" ? [1, 2] : [s[a]];
      menus[a].replaceChildren();
      for (const v of options) add(menus[a], "option", { value: v }, v);
      menus[a].value = s[a];
      menus[a].disabled = options.length < 2;
    }
    menus.G.parentNode.style.display = s.norm === "group" ? "" : "none";
    x = values(s);
    grid.replaceChildren();
    grid.classList.toggle("ax-photo", photo);
    grid.style = `--w: ${s.W}; --cols: ${s.N * s.W}; --gaps: ${s.N - 1}`;
    cells = [];
    const head = add(grid, "div", { role: "row" });
    add(head, "span", { role: "columnheader", class: "ax-C" }, "channel");
    for (let n = 0; n < s.N; n++) {
      const top = add(head, "span", { role: "columnheader", "aria-colspan": s.W, class: "ax-N" }, `sample ${n}`);
      if (photo) add(top, "canvas", { width: 7, height: 7 });
    }
    for (let c = 0; c < s.C; c++)
      for (let h = 0; h < s.H; h++) {
        const row = add(grid, "div", { role: "row", class: h ? "" : "ax-gap" });
        // The eye gets it once for a channel.
        add(row, "span", { role: "rowheader", class: "ax-C" }, `${photo ? ["red", "green", "blue"][c] : "channel " + c}${h ? `, row ${h}` : ""}`);
        for (let n = 0; n < s.N; n++)
          for (let w = 0; w < s.W; w++) {
            const cell = add(row, "span", { role: "gridcell", class: n && !w ? "ax-gap" : "" });
            cells.push(Object.assign(cell, { at: [n, c, h, w] }));
          }
      }
    slide.hidden = grid.scrollWidth <= grid.clientWidth;
    paint();
  }

  const color = (el, k) => {
    el.style.setProperty("--h", HUES[k % 8] + 16 * Math.floor(k / 8));
    el.dataset.look = k % 4;
  };

  function paint() {
    const photo = s.data === "photo";
    const refused = misfit(s);
    const wrong = s.norm === "broadcast";
    const groups = statistics(s, x);
    const me = over || s.at;
    const mine = me && !refused ? taken(s, me) : -1;
    const after = (q, v) => (v - groups[taken(s, q)].mean) / Math.sqrt(groups[taken(s, q)].variance + EPS);
    const shown = cells.map((cell) => {
      const v = x[index(cell.at, s)];
      return s.when === "after" && !refused ? after(cell.at, v) : v;
    });
    cells.forEach((cell, i) => {
      const k = refused ? -1 : taken(s, cell.at);
      const on = k === mine && mine >= 0;
      const chosen = s.at && place(cell.at) === place(s.at);
      const source = wrong && mine >= 0 && enters(s, cell.at) === mine;
      cell.classList.toggle("ax-off", k < 0 || (me && !on));
      cell.classList.toggle("ax-me", !!me && place(cell.at) === place(me));
      cell.classList.toggle("ax-from", source);
      color(cell, k);
      if (photo) cell.style.setProperty("--l", clamp(s.when === "after" ? 0.55 + 0.17 * shown[i] : 0.18 + (0.77 * shown[i]) / 255, 0.12, 0.97));
      else cell.textContent = s.when === "after" && !refused ? show(shown[i], 1) : shown[i];
      cell.ariaSelected = on;
      cell.ariaLabel = `${show(shown[i])} at ${place(cell.at)}` + (k < 0 ? "" : `, mean ${k}`) + (source ? ", in the mean" : "");
      cell.tabIndex = (s.at ? chosen : !i) ? 0 : -1;
    });
    grid.querySelectorAll("canvas").forEach((canvas, n) => {
      const pen = canvas.getContext("2d");
      for (let h = 0; h < 7; h++)
        for (let w = 0; w < 7; w++) {
          const rgb = [0, 1, 2].map((c) => shown[cells.findIndex((cell) => place(cell.at) === place([n, c, h, w]))]);
          pen.fillStyle = `rgb(${rgb.map((v) => (s.when === "after" ? 128 + 55 * v : v))})`;
          pen.fillRect(w, h, 1, 1);
        }
    });
    link.href = toLink(s);
    lines.textContent = code(s);
    const per = s.C / s.G;
    const count = groups[0].count;
    write(
      says,
      refused
        ? `A mean of length C = ${s.C} does not fit W = ${s.W}: x − mean ${s.W > 1 ? "raises an error" : "has another shape"}. Choose sizes with W = C.`
        : NORMS[s.norm][2].replace("*", per === 1 ? "channel" : `${per} channels`) + `: ${many(groups.length, "mean")}, each of ${many(count, "value")}.`,
    );
    live.replaceChildren();
    if (refused) return;
    if (!me) {
      add(live, "p", {}, "Touch a cell or use the arrow keys: its group comes forward.");
      const list = add(live, "ul", { "aria-label": "The means" });
      groups.slice(0, 8).forEach(({ mean }, k) => color(add(list, "li", {}, show(mean, 2)), k));
      if (groups.length > 8) add(list, "li", {}, "and " + (groups.length - 8) + " more");
      return;
    }
    const value = x[index(me, s)];
    const t = { ...groups[mine], value, y: after(me, value) };
    add(live, "p", {}, `Cell ${place(me)}`);
    write(add(live, "p", { class: "ax-big" }), "{value} → {y}", t);
    write(
      add(live, "p"),
      (wrong ? "It loses the mean of channel " + mine + " (dashed): {mean}" : "Mean {mean}") + ", variance {variance}, of " + (t.count === 1 ? "{count} cell." : "{count} cells."),
      t,
    );
    add(live, "p", {}, `(${show(value)} − mean) / √(variance + 10⁻⁵)`);
    if (s.at) add(live, "button", { type: "button" }, "Show all").onclick = () => go(null);
  }

  const go = (at) => {
    s.at = at;
    over = null;
    paint();
  };
  const under = (e) => e.target.closest("[role=gridcell]");
  grid.onclick = (e) => under(e) && go(s.at && place(under(e).at) === place(s.at) ? null : under(e).at);
  // Not pointerover: that also comes when the page scrolls under a mouse at rest.
  grid.onpointermove = (e) => {
    const cell = e.pointerType === "mouse" && under(e);
    if (!cell || cell.at === over) return;
    over = cell.at;
    paint();
  };
  grid.onpointerleave = () => {
    if (!over) return;
    over = null;
    paint();
  };
  grid.onkeydown = (e) => {
    if (e.key === "Escape") return go(null);
    const all = e.ctrlKey ? 99 : 0;
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0], Home: [-all, -99], End: [all, 99], " ": [0, 0], Enter: [0, 0] }[e.key];
    if (!step) return;
    e.preventDefault();
    const [n, c, h, w] = under(e).at;
    const row = clamp(c * s.H + h + step[0], 0, s.C * s.H - 1);
    const col = clamp(n * s.W + w + step[1], 0, s.N * s.W - 1);
    go([Math.floor(col / s.W), Math.floor(row / s.H), row % s.H, col % s.W]);
    const cell = cells.find((cell) => cell.tabIndex === 0);
    cell.focus({ preventScroll: true });
    // The numbers stay on the screen too, if there is room for both.
    for (const el of [live, cell]) el.scrollIntoView({ block: "nearest", inline: "nearest" });
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
