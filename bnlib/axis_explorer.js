// The axis explorer: pick a norm and a cell, and see which cells share its mean and variance.
// No dependencies. `mount(root)` serves a page, `export default { render }` serves anywidget.
const EPS = 1e-5;
const AXES = ["N", "C", "H", "W"];
const LIMITS = { N: 4, C: 6, H: 4, W: 4 };
// For every choice: its name, the mean's index, the axes summed over, and their numbers.
const NORMS = {
  batch: ["Batch norm", "c", "NHW", "0, 2, 3"],
  layer: ["Layer norm", "n", "CHW", "1, 2, 3"],
  instance: ["Instance norm", "nc", "HW", "2, 3"],
  group: ["Group norm", "ng", "HW", "2, 3, 4"],
  pixel: ["Mistake: a mean per pixel", "chw", "N", "0,"],
  broadcast: ["Mistake: x - mean, along W", "w", "NHW", "0, 2, 3"],
};
// 2 x 3 x 8 x 8 bytes, N C H W: flower and astronaut of bnlib.datasets.photographs().
const PHOTO =
  "BAQCAgMJBAcCAhVERxQCBAE11eXnrAYBAZDdxtPeMAMBn9i6xNtCAwZZzM/SswsBAglmjoJNAgECAhdYuMs2BikcM0ZILComMBMwV1AxQD5KS6OVmowhUkyAgENYlT48PXp0OUeLUDIoWIRpeYU7NxAdVG1yVEM8Dw0hY5OfYSwlGTRNWBsaHjETK0RDHTk5VkJnU15dGVZYW0IaIlguQUhNORkfTTovJTlON0FSIyENFDdFSDY3MAoIDztkaVspVLe4prDRjqBAuJ69gcyFsn21c7fN24S9pbZWFXXTlaWf5Llyk64sK9LXvcGvblocv8ettXcdFUSOzZ2vQw8cHUuvrpWkx3qZMq+NnnDBeK9DnmyZwdB+uH5kSBNozJKePXFUREJ1KCiOX2xndj9ZG1lRXlVNHRRCMGJkXjcOGxteqqR6l8FfllCneYNbvGivUZ1pgb3LerF9UkURZ82SlzpMNTkrXyYngjtwT2oxVRtEL2hCQR0UPiVCWUYyDhsb";

const size = (s) => AXES.map((a) => s[a]);
const index = ([n, c, h, w], s) => ((n * s.C + c) * s.H + h) * s.W + w;
const divisors = (c) => [...Array(c)].map((_, i) => i + 1).filter((g) => c % g === 0);
const clamp = (v, low, high) => Math.min(Math.max(v, low), high);

// The numbers: the tensor of the question for its own shape, else small integers.
function values(s) {
  if (s.data === "photo")
    return Array.from(atob(PHOTO).slice(0, s.N * 192), (byte) => byte.charCodeAt(0));
  if (size(s).every((d) => d === 2)) return [1, 0, 0, 0, 0, 1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7];
  const all = s.N * s.C * s.H * s.W;
  return [...Array(all)].map((_, i) => ((i * i * 7 + i * 5 + 3) % 11) + (i % s.W));
}

// Does the value of cell q enter the mean that is subtracted from the cell `at`?
function inMean(s, [n, c, h, w], q) {
  const per = s.C / s.G;
  return {
    batch: q[1] === c,
    layer: q[0] === n,
    instance: q[0] === n && q[1] === c,
    group: q[0] === n && Math.floor(q[1] / per) === Math.floor(c / per),
    pixel: q[1] === c && q[2] === h && q[3] === w,
    broadcast: q[1] === (s.C === 1 ? 0 : w),
  }[s.norm];
}

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

function who(s) {
  const [n, c, , w] = s.at;
  const per = s.C / s.G;
  const first = Math.floor(c / per) * per;
  const part = per > 1 ? `channels ${first} to ${first + per - 1}` : `channel ${first}`;
  return {
    batch: `channel ${c} in every sample`,
    layer: `sample ${n}, all its channels`,
    instance: `channel ${c} of sample ${n} alone`,
    group: `${part} of sample ${n}, group ${first / per} of ${s.G}`,
    pixel: `this position of channel ${c} in every sample`,
    broadcast: `channel ${s.C === 1 ? 0 : w}, because w is ${w}; the mean is subtracted from every dotted cell`,
  }[s.norm];
}

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
  ["#explore", s.norm, ...(s.data === "photo" ? ["photo"] : []), ...[...AXES, "G"].map((a) => a + s[a]), ...s.at.map((v, i) => "nchw"[i] + v)].join("-");

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
  const add = (parent, tag, attrs = {}, text = "") => {
    const el = parent.appendChild(document.createElement(tag));
    for (const [k, v] of Object.entries(attrs)) el.setAttribute(k, v);
    el.textContent = text;
    return el;
  };

  const bar = add(root, "div", { class: "ax-bar", role: "group", "aria-label": "What to show" });
  const inputs = {};
  const choice = (key, label) => {
    const axis = AXES.includes(key) ? `ax-${key.toLowerCase()}` : "";
    inputs[key] = add(add(bar, "label", { class: axis }, label), "select");
    inputs[key].name = key;
    inputs[key].onchange = () => {
      const v = inputs[key].value;
      s[key] = key === "norm" || key === "data" ? v : +v;
      if (key === "data") Object.assign(s, v === "photo" ? { N: 2 } : { C: 2, H: 2, W: 2 });
      settle(s);
      build();
    };
  };
  const fill = (key, options) => {
    inputs[key].replaceChildren();
    for (const [v, name] of options) add(inputs[key], "option", { value: v }, name);
    inputs[key].value = s[key];
    inputs[key].disabled = options.length < 2;
  };
  choice("norm", "Norm");
  choice("data", "Values");
  for (const a of AXES) choice(a, a);
  choice("G", "Groups G");

  const grid = add(root, "div", {
    class: "ax-grid",
    role: "grid",
    "aria-multiselectable": "true",
    "aria-label": "Cells of x. The selected ones share one mean and one variance.",
  });
  const formula = add(root, "p", { class: "ax-formula" });
  const live = add(root, "p", { class: "ax-live", "aria-live": "polite" });
  const lines = add(root, "pre", { class: "ax-code", tabindex: "0", role: "group", "aria-label": "The same in code" });
  const foot = add(root, "p", { class: "ax-foot" }, "Arrow keys move between the cells. ");
  const link = add(foot, "a", {}, "Link to this view");
  let cells = [];
  let x = [];

  function build() {
    const photo = s.data === "photo";
    const upTo = (k) => [...Array(k)].map((_, i) => [i + 1, i + 1]);
    fill("norm", Object.entries(NORMS).map(([k, [name]]) => [k, name]));
    fill("data", [["numbers", "numbers"], ["photo", "photographs"]]);
    for (const a of AXES)
      fill(a, !photo ? upTo(LIMITS[a]) : a === "N" ? upTo(2) : [[s[a], s[a]]]);
    fill("G", divisors(s.C).map((g) => [g, g]));
    inputs.G.parentNode.style.display = s.norm === "group" ? "" : "none";
    x = values(s);
    grid.replaceChildren();
    grid.classList.toggle("ax-photo", photo);
    cells = [];
    const head = add(grid, "div", { role: "row" });
    add(head, "span", { class: "ax-corner" });
    for (let n = 0; n < s.N; n++) {
      const title = add(head, "span", { role: "columnheader", "aria-colspan": s.W, class: "ax-n" }, `n=${n}`);
      title.style.setProperty("--span", s.W);
      if (photo) {
        // What the three planes below are together.
        const picture = add(title, "canvas", { width: 8, height: 8, "aria-hidden": "true" });
        const pixels = new ImageData(8, 8);
        for (let i = 0; i < 256; i++)
          pixels.data[i] = i % 4 === 3 ? 255 : x[n * 192 + (i % 4) * 64 + (i >> 2)];
        picture.getContext("2d").putImageData(pixels, 0, 0);
      }
    }
    for (let c = 0; c < s.C; c++)
      for (let h = 0; h < s.H; h++) {
        const row = add(grid, "div", { role: "row", class: h ? "" : "ax-gap" });
        const name = photo ? "RGB"[c] : `c=${c}`;
        const title = add(row, "span", { role: "rowheader", class: "ax-c" });
        add(title, "span", { class: h ? "ax-hidden" : "" }, name);
        add(title, "span", { class: "ax-hidden" }, ` h=${h}`);
        for (let n = 0; n < s.N; n++)
          for (let w = 0; w < s.W; w++) {
            const v = x[index([n, c, h, w], s)];
            const cell = add(row, "span", { role: "gridcell" }, photo ? "" : show(v));
            if (photo) cell.style.background = `rgb(${[0, 1, 2].map((k) => (k === c ? v : 0))})`;
            cells.push(Object.assign(cell, { at: [n, c, h, w], value: v, start: n && !w }));
          }
      }
    paint();
  }

  function paint(focus) {
    const refused = misfit(s);
    const lit = refused ? [] : cells.filter((cell) => inMean(s, s.at, cell.at));
    for (const cell of cells) {
      const on = lit.includes(cell);
      const me = String(cell.at) === String(s.at);
      const dotted = !refused && s.norm === "broadcast" && cell.at[3] === s.at[3];
      cell.className = [cell.start && "ax-gap", on && "ax-lit", me && "ax-me", dotted && "ax-dot"].filter(Boolean).join(" ");
      cell.setAttribute("aria-selected", on);
      cell.tabIndex = me ? 0 : -1;
      const [n, c, h, w] = cell.at;
      cell.setAttribute("aria-label", `${show(cell.value)} at n ${n}, c ${c}, h ${h}, w ${w}`);
      if (me && focus) cell.focus();
    }
    link.href = toLink(s);
    lines.textContent = code(s);
    const [, sub, over, axes] = NORMS[s.norm];
    const [n, c, h, w] = s.at;
    formula.replaceChildren();
    const letter = (a) => add(formula, "b", { class: `ax-${a.toLowerCase()}` }, a);
    formula.append("μ");
    add(formula, "sub", {}, s.norm === "broadcast" ? "c" : sub);
    formula.append(" = mean of x over ");
    [...over].forEach((a, i) => {
      if (i) formula.append(" · ");
      letter(a);
    });
    formula.append(s.norm === "group" ? " and the C/G channels of group g" : "", `, axis=(${axes.replaceAll(" ", "\u00a0")})`);
    if (s.norm === "broadcast") {
      formula.append(", but x − μ subtracts μ");
      add(formula, "sub", {}, "w");
    }
    live.replaceChildren(`Cell n=${n}, c=${c}, h=${h}, w=${w}: `);
    if (refused) {
      live.append(`a mean of length C = ${s.C} does not fit the last axis, W = ${s.W}: x - mean raises an error${s.W > 1 ? "" : " or has another shape"}.`);
      return;
    }
    const t = statistics(s, x, lit.map((cell) => cell.at));
    const number = (key) => add(live, "b", { "data-of": key }, show(t[key]));
    number("count");
    const one = t.count === 1;
    const verb = s.norm === "broadcast" ? "in the mean" : one ? "has its own mean" : "share one mean";
    live.append(` cell${one ? "" : "s"} ${verb}: ${who(s)}. Mean `);
    number("mean");
    live.append(", variance ");
    number("variance");
    live.append(". Output (");
    number("value");
    live.append(` − ${show(t.mean)}) / √(${show(t.variance)} + 10⁻⁵) = `);
    number("y");
    live.append(".");
  }

  const go = (at) => {
    s.at = at;
    paint(true);
  };
  const under = (e) => e.target.closest("[role=gridcell]");
  grid.onclick = (e) => under(e) && go(under(e).at);
  grid.onpointerover = (e) => {
    if (e.pointerType !== "mouse" || !under(e)) return;
    s.at = under(e).at;
    paint(grid.contains(document.activeElement));
  };
  grid.onkeydown = (e) => {
    const [n, c, h, w] = s.at;
    const [rows, cols] = [s.C * s.H, s.N * s.W];
    let [row, col] = [c * s.H + h, n * s.W + w];
    if (e.key === "ArrowLeft") col--;
    else if (e.key === "ArrowRight") col++;
    else if (e.key === "ArrowUp") row--;
    else if (e.key === "ArrowDown") row++;
    else if (e.key === "Home") [col, row] = [0, e.ctrlKey ? 0 : row];
    else if (e.key === "End") [col, row] = [cols - 1, e.ctrlKey ? rows - 1 : row];
    else return;
    e.preventDefault();
    row = clamp(row, 0, rows - 1);
    col = clamp(col, 0, cols - 1);
    go([Math.floor(col / s.W), Math.floor(row / s.H), row % s.H, col % s.W]);
  };
  const follow = () => {
    const asked = fromLink(location.hash);
    if (!asked || toLink(asked) === toLink(s)) return;
    Object.assign(s, asked);
    build();
    root.scrollIntoView({ block: "center" });
  };
  addEventListener("hashchange", follow);
  build();
  follow();
  return () => removeEventListener("hashchange", follow);
}

export default { render: ({ el }) => (el.classList.add("axis-explorer"), mount(el)) };
