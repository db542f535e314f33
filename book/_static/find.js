/* Search the book's sections, terms, symbols and names, which `_ext/find.py` has put into BOOK. A
   place is found if it has every word of the query, or its beginning; "gamma" is γ, and a plural is
   its singular. What the query names (a term, a symbol) comes before where it is used. */
(() => {
  const GREEK = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho";
  const names = Object.fromEntries(GREEK.split(" ").map((name, i) => [String.fromCharCode(945 + i), name]));
  for (const [i, name] of "sigma tau upsilon phi chi psi omega".split(" ").entries())
    names[String.fromCharCode(963 + i)] = name;
  const FIRST = { term: 30, symbol: 30, name: 15, page: 10, section: 0 };
  const KINDS = { term: "Glossary", symbol: "Notation", name: "API reference" };
  const MOST = 40; // results
  const ROOM = 170; // signs of a result's text

  const WORD = /[\p{L}\p{M}\p{N}_]+/gu;
  const fold = (word) =>
    word.normalize("NFD").replace(/\p{M}/gu, "").toLowerCase()
      .replace(/[α-ω]/g, (letter) => names[letter] ?? letter)
      .replace(/^var(epsilon|phi|theta)$/, "$1").replace(/iz(?=e|a|i)/, "is");
  const wordsOf = (text) => (text.match(WORD) ?? []).map(fold);
  const single = (word) =>
    word.length < 4 ? word : word.replace(/(ss|x|ch|sh)es$|([^su])s$/, "$1$2");

  function worth(place, asked) {
    let sum = 0;
    for (const word of asked) {
      const times = (all) => all.filter((w) => w === word || single(w) === word).length;
      const begins = (all) => all.some((w) => (word.length > 1 ? w.startsWith(word) : w === word));
      const own = times(place.titled) ? 20 : begins(place.titled) ? 12 : 0;
      const text = Math.min(4, 2 * times(place.said)) || (begins(place.said) ? 1 : 0);
      const code = begins(place.coded) ? 1 : 0;
      if (!(own || text || code)) return 0;
      sum += own + text + code;
    }
    const named = asked.every((word) => place.titled.some((w) => w.startsWith(word)));
    if (named) sum += FIRST[place.kind] + (place.titled.length <= asked.length ? 60 : 0);
    else if (place.kind === "term") sum += 5;
    return sum + (` ${place.said.join(" ")} `.includes(` ${asked.join(" ")} `) ? 6 : 0);
  }

  function find(query) {
    const places = Object.entries(BOOK).flatMap(([page, [on, found]]) =>
      found.map(([kind, anchor, title, text, code]) => ({
        kind, page, on, title, text, href: kind === "page" ? page : `${page}#${anchor}`,
        titled: wordsOf(title), said: wordsOf(text), coded: wordsOf(code),
      })));
    const asked = [...new Set(wordsOf(query).map(single))];
    if (!asked.length) return { asked, found: [] };
    const found = places.map((place) => [worth(place, asked), place])
      .filter(([sum]) => sum > 0).sort((a, b) => b[0] - a[0]).map(([, place]) => place);
    return { asked, found };
  }

  // The part of a text that has most of the words, cut at words, with those marked.
  function quote(text, asked) {
    const hits = [...text.matchAll(WORD)]
      .filter((m) => asked.some((word) => word.length > 1 && fold(m[0]).startsWith(word)));
    let from = 0, best = -1;
    for (const hit of hits) {
      const near = new Set(hits.filter((m) => m.index >= hit.index && m.index < hit.index + ROOM - 40)
        .map((m) => asked.find((word) => fold(m[0]).startsWith(word)))).size;
      if (near > best) [best, from] = [near, hit.index];
    }
    from = from < 60 ? 0 : text.indexOf(" ", from - 50) + 1;
    let to = Math.min(text.length, from + ROOM);
    if (to < text.length) to = text.lastIndexOf(" ", to);
    const line = document.createElement("p");
    line.append(from ? "… " : "");
    let at = from;
    for (const hit of hits.filter((m) => m.index >= from && m.index + m[0].length <= to)) {
      const mark = document.createElement("mark");
      mark.textContent = hit[0];
      line.append(text.slice(at, hit.index), mark);
      at = hit.index + hit[0].length;
    }
    line.append(text.slice(at, to), to < text.length ? " …" : "");
    return line;
  }

  function show({ asked, found }) {
    const summary = document.createElement("p");
    summary.className = "search-summary";
    summary.role = "status";
    const more = found.length > MOST ? `, the first ${MOST} of them below` : "";
    summary.textContent = found.length
      ? `${found.length} ${found.length === 1 ? "place" : "places"} in the book${more}.`
      : "Nothing in the book has all of these words. Try fewer, or other ones.";
    const list = document.createElement("ul");
    list.className = "search";
    for (const place of found.slice(0, MOST)) {
      const item = document.createElement("li");
      const link = document.createElement("a");
      const where = document.createElement("span");
      [link.href, link.textContent] = [place.href, place.title];
      where.className = "search-where";
      where.textContent = place.kind === "page" ? "" : KINDS[place.kind] ?? place.on;
      item.append(link, " ", where, place.text ? quote(place.text, asked) : "");
      list.append(item);
    }
    box.append(summary, found.length ? list : "");
  }

  const query = new URLSearchParams(location.search).get("q") ?? "";
  const box = document.getElementById("search-results");
  for (const field of document.querySelectorAll("form.bd-search input[name=q]")) field.value = query;
  if (!box || !query.trim()) return;
  const index = document.createElement("script");
  index.src = document.currentScript.src.replace("find.js", "sections.js");
  index.onload = () => show(find(query));
  document.head.append(index);
})();
