"""Every number that the axis explorer shows is NumPy's, and it can be used without a mouse."""

from __future__ import annotations

import base64
import gzip
import io
import itertools
import re

import numpy as np
import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from PIL import Image

import bnlib
from bnlib.book.colors import AXIS_COLORS
from bnlib.book.datasets import photographs
from bnlib.book.explorer import AxisExplorer, axis_explorer

LIMITS = (4, 6, 4, 4)
NORMS = ("batch", "layer", "instance", "group", "pixel", "broadcast")
LARGEST = 6 * 1024  # bytes of script and style sheet, compressed


def page_of(explorer, theme="light"):
    colors = ";".join(f"--axis-{a.lower()}:{getattr(c, theme)}" for a, c in AXIS_COLORS.items())
    page, ink = ("#14181e", "#ddd") if theme == "dark" else ("#fff", "#222")
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Explorer</title>'
        '<meta name="viewport" content="width=device-width">'
        f"<style>html{{{colors};--pst-color-background:{page};--pst-color-text-base:{ink}}}"
        f"body{{background:{page};color:{ink}}} a{{color:inherit}}</style>"
        f"<main><h1>Explorer</h1>{explorer._repr_html_()}</main>"
    )


@pytest.fixture(scope="module")
def page(browser, tmp_path_factory):
    path = tmp_path_factory.mktemp("explorer") / "explorer.html"
    path.write_text(page_of(axis_explorer()), encoding="utf-8")
    page = browser.new_page(viewport={"width": 900, "height": 900})
    page.set_default_timeout(5000)
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text))
    page.goto(path.as_uri())
    yield page
    assert problems == []
    page.close()


# --- What NumPy says ------------------------------------------------------------------------------


def photo_bytes():
    thumbnails = []
    for name in ("flower", "astronaut"):
        photo = photographs()[name].astype(np.float64)
        top, left = ((side - 256) // 2 for side in photo.shape[1:])
        square = photo[:, top : top + 256, left : left + 256]
        means = square.reshape(3, 8, 32, 8, 32).mean(axis=(2, 4))
        # One digit of base 36 for each byte, hence steps of 7 up to 245.
        thumbnails.append(np.minimum(np.floor(means * 255 / 7 + 0.5), 35) * 7)
    return np.stack(thumbnails)


def tensor(state):
    shape = state["shape"]
    if state["photo"]:
        return photo_bytes()[: shape[0]]
    if shape == (2, 2, 2, 2):
        eye = torch.eye(2, 4).reshape(2, 2, 2)
        return torch.stack([eye, torch.arange(8).reshape(2, 2, 2)]).double().numpy()
    i = np.arange(np.prod(shape))
    return (((i * i * 7 + i * 5 + 3) % 11) + i % shape[3]).reshape(shape).astype(float)


def expected(state):
    """The mask of the cells in the mean, and the numbers; None where NumPy refuses."""
    x, norm, at, groups = tensor(state), state["norm"], state["at"], state["groups"]
    n, c, h, w = at
    mask = np.zeros(x.shape, dtype=bool)
    per = x.shape[1] // groups
    first = c // per * per
    if norm == "broadcast":
        mean = x.mean(axis=(0, 2, 3))
        try:
            if (x - mean).shape != x.shape:
                return None
        except ValueError:
            return None
        mask[:, np.broadcast_to(np.arange(len(mean)), x.shape)[at]] = True
    else:
        where = {
            "batch": np.s_[:, c],
            "layer": np.s_[n],
            "instance": np.s_[n, c],
            "group": np.s_[n, first : first + per],
            "pixel": np.s_[:, c, h, w],
        }
        mask[where[norm]] = True
    inside = x[mask]
    y = (x[at] - inside.mean()) / np.sqrt(inside.var() + 1e-5)
    return mask, {
        "count": inside.size,
        "mean": inside.mean(),
        "variance": inside.var(),
        "value": x[at],
        "y": y,
    }


def expected_dots(state):
    """The mask of the cells from which ``x - mean`` subtracts the chosen cell's mean."""
    x, at = tensor(state), state["at"]
    if state["norm"] != "broadcast" or expected(state) is None:
        return np.zeros(x.shape, dtype=bool)
    which = np.broadcast_to(np.arange(x.shape[1]), x.shape)
    return which == which[at]


def random_states(count, seed):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        photo = bool(rng.random() < 0.15)
        shape = (
            (int(rng.integers(1, 3)), 3, 8, 8)
            if photo
            else tuple(int(rng.integers(1, most + 1)) for most in LIMITS)
        )
        divisors = [g for g in range(1, shape[1] + 1) if shape[1] % g == 0]
        yield {
            "norm": str(rng.choice(NORMS)),
            "photo": photo,
            "shape": shape,
            "groups": int(rng.choice(divisors)),
            "at": tuple(int(rng.integers(d)) for d in shape),
        }


def fragment(state):
    words = ["#explore", state["norm"], *(["photo"] if state["photo"] else [])]
    words += [f"{a}{d}" for a, d in zip("NCHW", state["shape"], strict=True)]
    words += [f"G{state['groups']}"]
    words += [f"{a}{i}" for a, i in zip("nchw", state["at"], strict=True)]
    return "-".join(words)


# --- What the page says ---------------------------------------------------------------------------

READ = """() => {
  const cells = [...document.querySelectorAll("[role=gridcell]")];
  return {
    cells: cells.map((c) => [c.ariaLabel, c.ariaSelected, c.textContent]),
    stops: cells.filter((c) => c.tabIndex === 0).map((c) => c.ariaLabel),
    numbers: Object.fromEntries(
      [...document.querySelectorAll("[data-of]")].map((b) => [b.dataset.of, b.textContent])),
    live: document.querySelector("[aria-live]").textContent,
    caption: document.querySelector(".ax-side p").textContent,
    link: document.querySelector(".ax-foot a").getAttribute("href"),
    code: document.querySelector(".ax-code").textContent,
    formula: document.querySelector(".ax-formula").textContent,
  };
}"""
LABEL = re.compile(
    r"(.+) at n=(\d+), c=(\d+), h=(\d+), w=(\d+)(, in the mean)?(, dotted)?", re.ASCII
)
PLACES = re.compile(r"((?:(?:every [nchw]|[nchw]=\d+(?: to \d+)?)(?:, )?){4})")


def number(text):
    return float(text.replace("\u2212", "-"))


def masks_in_words(text, shape):
    """The sets of cells that a sentence names, such as ``n=1, c=2 to 3, every h, every w``."""
    for places in PLACES.findall(text):
        mask = np.ones(shape, dtype=bool)
        for words in places.strip(", ").split(", "):
            if not words.startswith("every"):
                axis, first, last = re.fullmatch(r"(.)=(\d+)(?: to (\d+))?", words).groups()
                i = np.arange(shape["nchw".index(axis)])
                inside = (i >= int(first)) & (i <= int(last or first))
                mask &= bnlib.per_channel(inside, 4, "nchw".index(axis))
        yield mask


def shown_problems(state, seen):
    """Where what the page shows is not what NumPy says."""
    x, answer = tensor(state), expected(state)
    problems = []
    mask, heard, dots = np.zeros((3, *x.shape), dtype=bool)
    if len(seen["cells"]) != x.size:
        return [f"{len(seen['cells'])} cells are shown of {x.size}"]
    for label, selected, text in seen["cells"]:
        value, *at, in_mean, dotted = LABEL.fullmatch(label).groups()
        at = tuple(map(int, at))
        mask[at] = selected == "true"
        heard[at], dots[at] = bool(in_mean), bool(dotted)
        if number(value) != x[at] or (not state["photo"] and number(text) != x[at]):
            problems.append(f"cell {at} shows {label!r}, x is {x[at]}")
    n, c, h, w = state["at"]
    stops = [LABEL.fullmatch(label).groups()[1:5] for label in seen["stops"]]
    if stops != [(str(n), str(c), str(h), str(w))]:
        problems.append(f"the tab stops are {seen['stops']}")
    if (heard != mask).any() or (dots != expected_dots(state)).any():
        problems.append("the cells' names do not say which are in the mean, and which dotted")
    if answer is None:
        if seen["numbers"] or mask.any() or "does not fit" not in seen["live"]:
            problems.append(f"NumPy refuses, and the page says {seen['live']!r}")
        return problems
    if (mask != answer[0]).any():
        problems.append(f"other cells are lit than enter the mean: {np.argwhere(mask).tolist()}")
    chosen = np.zeros(x.shape, dtype=bool)
    chosen[state["at"]] = True
    sets = [chosen, answer[0], *([expected_dots(state)] if state["norm"] == "broadcast" else [])]
    told = list(masks_in_words(seen["live"], x.shape))
    if len(told) != len(sets) or (np.array(told) != np.array(sets)).any():
        problems.append(f"the sentence names other cells: {seen['live']!r}")
    if set(seen["numbers"]) != set(answer[1]):
        return [*problems, f"the page shows the numbers {seen['numbers']}"]
    for key, value in answer[1].items():
        if abs(number(seen["numbers"][key]) - value) > 0.0005 + 1e-9:
            problems.append(f"{key} is {value}, the page shows {seen['numbers'][key]}")
    return problems


def follow(page, state):
    page.evaluate("(hash) => { location.hash = hash; }", fragment(state))
    page.wait_for_function(
        "(hash) => document.querySelector('.ax-foot a').getAttribute('href') === hash",
        arg=fragment(state),
    )
    return page.evaluate(READ)


def test_numbers_of_random_links(page):
    kinds = set()
    for state in random_states(150, seed=0):
        seen = follow(page, state)
        assert shown_problems(state, seen) == [], state
        kinds.add((state["norm"], state["photo"]))
    assert len(kinds) == 12, "every norm, with numbers and with photographs"


def test_comparison_can_fail(page):
    state = next(s for s in random_states(50, seed=1) if s["norm"] == "group" and not s["photo"])
    seen = follow(page, state)
    assert shown_problems(state, seen) == []
    for change in (
        {"norm": "layer"},
        {"at": tuple((i + 1) % d for i, d in zip(state["at"], state["shape"], strict=True))},
    ):
        assert shown_problems(state | change, seen)
    seen["numbers"]["variance"] = "0.123"
    assert shown_problems(state, seen)


def test_numbers_are_those_of_the_layers(page):
    """Independent of the masks above: the output of PyTorch's and bnlib's own layers."""
    functional = torch.nn.functional
    layers = {
        "batch": lambda x, g: torch.from_numpy(bnlib.batch_norm_forward(x.numpy())[0]),
        "layer": lambda x, g: functional.layer_norm(x, x.shape[1:]),
        "instance": lambda x, g: functional.instance_norm(x),
        "group": lambda x, g: functional.group_norm(x, g),
    }
    compared = 0
    for state in random_states(60, seed=2):
        n, c, h, w = state["shape"]
        if state["norm"] in layers and min(h * w, n * h * w, c * h * w) > 1:
            y = layers[state["norm"]](torch.from_numpy(tensor(state)), state["groups"])
            shown = number(follow(page, state)["numbers"]["y"])
            assert abs(shown - y[state["at"]].item()) < 0.0006, state
            compared += 1
    assert compared > 20


def test_code_runs_and_gives_the_mean_that_is_shown(page):
    for state in random_states(40, seed=3):
        seen = follow(page, state)
        axes = re.search(r"axis=\((.*?)\)", seen["formula"])[1].replace("\xa0", " ")
        assert f"axis=({axes})" in seen["code"]
        mean_line = next(line for line in seen["code"].splitlines() if line.startswith("mean = "))
        names = {"x": tensor(state)}
        exec(mean_line, names)
        if seen["numbers"]:
            near = np.abs(names["mean"] - number(seen["numbers"]["mean"])).min()
            assert near < 0.0006, (state, mean_line)


def test_hostile_links_are_brought_into_range(page):
    for text in (
        "-toString-N99-C0-H1e9-Wx-G7-n9-c9-h9-w9",
        "-photo-N9-C1-G2-w99",
        "-%3Cimg%20src=x%20onerror=alert(1)%3E",
        "-N3-",
        "",
    ):
        page.evaluate("() => { location.hash = '#explore-pixel-N3'; }")
        page.wait_for_function("document.querySelector('.ax-foot a').href.includes('pixel')")
        page.evaluate("(hash) => { location.hash = hash; }", f"#explore{text}")
        page.wait_for_function("!document.querySelector('.ax-foot a').href.includes('pixel')")
        words = page.evaluate(READ)["link"].split("-")
        found = {word[0]: int(word[1:]) for word in words if re.fullmatch(r"[A-Za-z]\d+", word)}
        state = {
            "norm": words[1],
            "photo": words[2] == "photo",
            "shape": tuple(found[a] for a in "NCHW"),
            "groups": found["G"],
            "at": tuple(found[a] for a in "nchw"),
        }
        assert state["norm"] == "batch"
        assert shown_problems(state, page.evaluate(READ)) == []


def test_keyboard_only(page):
    """One tab stop in the grid; arrows, Home and End reach every cell; the numbers follow."""
    state = {
        "norm": "group",
        "photo": False,
        "shape": (2, 4, 2, 3),
        "groups": 2,
        "at": (0, 0, 0, 0),
    }
    follow(page, state)
    page.focus("select[name=G]")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('role')") == "gridcell"
    (rows, columns), place = (8, 6), [0, 0]
    moves = {
        "ArrowRight": (0, 1),
        "ArrowDown": (1, 0),
        "ArrowLeft": (0, -1),
        "ArrowUp": (-1, 0),
        "End": (0, columns),
        "Home": (0, -columns),
        "Control+End": (rows, columns),
        "Control+Home": (-rows, -columns),
    }
    keys = [*moves, *np.random.default_rng(4).choice(list(moves)[:6], 30)]
    for key in keys:
        page.keyboard.press(str(key))
        place = [
            int(np.clip(i + d, 0, most - 1))
            for i, d, most in zip(place, moves[key], (rows, columns), strict=True)
        ]
        at = (place[1] // 3, place[0] // 2, place[0] % 2, place[1] % 3)
        assert shown_problems(state | {"at": at}, page.evaluate(READ)) == [], key
        focus = page.evaluate("document.activeElement.getAttribute('aria-label')")
        assert f" at n={at[0]}, c={at[1]}, h={at[2]}, w={at[3]}" in focus
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "ax-code"


def test_mouse_touch_and_menus(page):
    follow(page, next(random_states(1, seed=5)))
    page.select_option("select[name=data]", "numbers")
    for name, value in (("norm", "layer"), ("N", "3"), ("C", "4"), ("H", "2"), ("W", "2")):
        page.select_option(f"select[name={name}]", value)
    assert page.is_hidden("select[name=G]")
    page.select_option("select[name=norm]", "group")
    menu = page.locator("select[name=G] option").all_text_contents()
    assert menu == ["1", "2", "4"], "only divisors of C"
    page.select_option("select[name=G]", "2")
    page.click("[aria-label*='n=1, c=2, h=1, w=0']")
    state = {
        "norm": "group",
        "photo": False,
        "shape": (3, 4, 2, 2),
        "groups": 2,
        "at": (1, 2, 1, 0),
    }
    assert shown_problems(state, page.evaluate(READ)) == []
    page.hover("[aria-label*='n=2, c=0, h=0, w=1']")
    state["at"] = (2, 0, 0, 1)
    assert shown_problems(state, page.evaluate(READ)) == []


def test_accessibility_tree_says_which_cells_share_a_mean(page):
    """Reading the tree alone, for group norm: from the cells' names, and from one sentence."""
    state = {
        "norm": "group",
        "photo": False,
        "shape": (2, 4, 1, 2),
        "groups": 2,
        "at": (1, 2, 0, 1),
    }
    follow(page, state)
    tree = page.locator("main").aria_snapshot()
    lit = re.findall(r'gridcell "\d+ at ([^"]*), in the mean" \[selected\]', tree)
    assert sorted(lit) == [f"n=1, c={c}, h=0, w={w}" for c, w in itertools.product((2, 3), (0, 1))]
    sentence = re.sub(r"\s+", " ", page.inner_text("[aria-live]"))
    assert sentence.startswith(
        "Cell n=1, c=2, h=0, w=1: 4 cells share one mean: "
        "n=1, c=2 to 3, h=0, every w (group 1 of 2). Mean "
    )
    for needed in (
        'region "Axis explorer: which cells share one mean"',
        'combobox "Norm"',
        'columnheader "n=1"',
        'rowheader "c=2 h=0"',
        'img "Photographs',
    ):
        assert needed in tree, tree
    hint, grid = (tree.index(part) for part in ("arrow keys", 'grid "'))
    assert hint < grid, "a reader hears of the arrow keys before the grid"
    assert page.get_attribute("[aria-live]", "aria-atomic") == "true"


def test_accessibility_tree_says_where_the_mean_is_subtracted(page):
    state = {
        "norm": "broadcast",
        "photo": False,
        "shape": (1, 2, 1, 2),
        "groups": 1,
        "at": (0, 0, 0, 1),
    }
    follow(page, state)
    tree = page.locator(".axis-explorer").aria_snapshot()
    cells = re.findall(r'gridcell "\d+ at n=0, ([^"]*)"', tree)
    assert cells == [
        "c=0, h=0, w=0",
        "c=0, h=0, w=1, dotted",
        "c=1, h=0, w=0, in the mean",
        "c=1, h=0, w=1, in the mean, dotted",
    ]


# The cell of the two questions: which cells share its mean, and can the answer be seen?
GROUPS = {"norm": "group", "photo": False, "groups": 2, "at": (1, 2, 0, 1)}
SEEN = """(cell) => {
  const live = document.querySelector("[aria-live]");
  const free = (el, x, y) => el.contains(document.elementFromPoint(x, y));
  const within = (box) => box.top >= 0 && box.bottom <= innerHeight;
  const [a, b] = [cell.getBoundingClientRect(), live.getBoundingClientRect()];
  return within(a) && within(b)
    && [a.top + 1, a.bottom - 1].every((y) => free(cell, a.left + 5, y))
    && [b.top + 10, b.bottom - 10].every((y) => free(live, b.left + 5, y));
}"""


@pytest.mark.parametrize(("width", "height"), [(1280, 720), (375, 700)])
@pytest.mark.parametrize("name", ["intro.html", "axes/which-axes.html"])
def test_answer_is_on_the_screen_while_the_keys_move(browser, site, name, width, height):
    """In the book's own pages, from the top of the page, with the keyboard alone."""
    context = browser.new_context(viewport={"width": width, "height": height})
    page = context.new_page()
    page.goto((site / "book" / name).as_uri())
    here = "document.activeElement.name || document.activeElement.getAttribute('role')"
    for _ in range(200):
        page.keyboard.press("Tab")
        if page.evaluate(here) == "norm":
            break
    page.keyboard.type("Gr")
    for stop, key in (
        ("data", None),
        ("N", None),
        ("C", "4"),
        ("H", None),
        ("W", None),
        ("G", "2"),
    ):
        page.keyboard.press("Tab")
        assert page.evaluate(here) == stop
        if key:
            page.keyboard.type(key)
    page.keyboard.press("Tab")
    assert page.evaluate(here) == "gridcell"
    keys = ["ArrowRight"] * 3 + ["ArrowDown"] * 4
    for key in keys + ["ArrowDown"] * 3 + ["ArrowUp"] * 7 + ["ArrowDown"] * 4:
        page.keyboard.press(key)
        assert page.locator(":focus").evaluate(SEEN), page.locator(":focus").aria_snapshot()
    state = GROUPS | {"shape": (2, 4, 2, 2)}
    assert shown_problems(state, page.evaluate(READ)) == []
    page.evaluate("document.querySelector('[aria-live]').style.position = 'static'")
    before = page.evaluate("scrollY")
    page.mouse.wheel(0, 10_000)
    page.wait_for_function(f"scrollY > {before + 1000}")
    assert not page.locator(":focus").evaluate(SEEN), "the check can fail"
    context.close()


@pytest.mark.parametrize(("width", "height"), [(1280, 720), (375, 700)])
def test_largest_tensor_is_seen_at_once(browser, site, width, height):
    page = browser.new_page(viewport={"width": width, "height": height})
    page.goto((site / "book/intro.html").as_uri() + fragment(GROUPS | {"shape": LIMITS}))
    grid = page.locator("[role=grid]")
    assert grid.evaluate("(grid) => grid.scrollWidth <= grid.clientWidth")
    assert grid.bounding_box()["height"] < 0.75 * height
    page.close()


def test_current_cell_is_told_from_the_lit_ones_and_from_the_focus(page):
    # A pixel of a photograph keeps its colour: there the frame alone tells.
    for state, part in (
        (GROUPS | {"shape": (2, 4, 2, 2)}, "backgroundColor"),
        (GROUPS | {"photo": True, "shape": (2, 3, 8, 8), "groups": 1}, "borderTopWidth"),
    ):
        follow(page, state)
        style = f"""(cell) => {{
          const style = getComputedStyle(cell);
          const ring = ["outlineStyle", "outlineColor", "outlineOffset"];
          const parts = [{part!r}, ...(style.outlineStyle === "none" ? [] : ring)];
          return parts.map((part) => style[part]).join();
        }}"""
        page.focus("select[name=norm]")
        current = page.locator("[role=gridcell][tabindex='0']")
        lit = page.locator("[aria-selected=true]:not([tabindex='0'])").first
        looks = {lit.evaluate(style), current.evaluate(style)}
        page.keyboard.press("Tab")
        current.focus()
        looks.add(current.evaluate(style))
        assert len(looks) == 3, looks


def test_mouse_at_rest_leaves_the_keys_alone(browser, tmp_path):
    """A page that scrolls under the mouse must not move the chosen cell."""
    (tmp_path / "x.html").write_text(page_of(axis_explorer("layer", LIMITS)), encoding="utf-8")
    page = browser.new_page(viewport={"width": 375, "height": 420})
    page.goto((tmp_path / "x.html").as_uri())
    page.evaluate("scrollTo(0, 250)")
    page.mouse.move(200, 250)
    assert "n=0, c=0, h=0, w=0" not in page.inner_text("[aria-live]"), "the mouse chooses"
    page.focus("[role=gridcell][tabindex='0']")
    for key in ("Control+Home", "Control+End"):
        page.keyboard.press(key)
        page.wait_for_timeout(300)
    assert page.inner_text("[aria-live]").startswith("Cell n=3, c=5, h=3, w=3:")
    under = "document.elementFromPoint(200, 250).ariaLabel"
    assert page.evaluate("scrollY") > 200 and " at n=" in page.evaluate(under)
    page.close()


def test_jupyterlab_leaves_the_keys_to_the_explorer(page):
    """Its shortcuts stop at this attribute of the focused element; else "dd" deletes a cell."""
    stops = page.locator(".axis-explorer").locator("select, a, [tabindex]")
    assert stops.count() > 10
    assert stops.evaluate_all("(all) => all.every((el) => 'lmSuppressShortcuts' in el.dataset)")


def test_paper_has_the_answer_and_no_menus(page):
    follow(page, GROUPS | {"shape": (2, 4, 2, 2)})
    assert page.is_visible(".ax-bar") and page.is_visible(".ax-foot")
    page.emulate_media(media="print")
    assert page.is_hidden(".ax-bar") and page.is_hidden(".ax-foot")
    assert page.inner_text(".ax-formula").startswith("Group norm: μ")
    assert "8 cells share one mean" in page.inner_text("[aria-live]")
    page.emulate_media(media="screen")


# --- The photographs beside the numbers -----------------------------------------------------------

PICTURE = """() => {
  return document.querySelector(".axis-explorer canvas").toDataURL().split(",")[1];
}"""


def test_photographs_beside_show_the_same_norm(page):
    x = photo_bytes()
    for state in random_states(40, seed=6):
        seen = follow(page, state)
        groups = 3 if state["groups"] >= 3 else 1
        at = tuple(min(i, d - 1) for i, d in zip(state["at"], x.shape, strict=True))
        beside = {
            "norm": state["norm"],
            "photo": True,
            "shape": (min(state["shape"][0], 2), 3, 8, 8),
            "groups": groups,
            "at": at,
        }
        answer = expected(beside)
        png = io.BytesIO(base64.b64decode(page.evaluate(PICTURE)))
        pixels = np.asarray(Image.open(png).convert("RGBA"))
        for n in range(beside["shape"][0]):
            for k, (h, w) in itertools.product(range(4), np.ndindex(8, 8)):
                square = pixels[27 * k + 3 * h :, 27 * n + 3 * w :][:3, :3]
                color = x[n, :, h, w] * (1 if k == 0 else np.arange(3) == k - 1)
                assert (square[1, 1] == [*color, 255]).all()
                whole = k == 0 or (answer is not None and answer[0][n, k - 1, h, w])
                assert (square[0, 0, 3] > 0) == whole, (state, n, k, h, w)
        if answer is None:
            assert "raises an error" in seen["caption"]
        else:
            (told,) = masks_in_words(seen["caption"], beside["shape"])
            assert (told == answer[0]).all()
            assert " to 7" not in seen["caption"], "every h, every w"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_no_accessibility_violation(browser, theme, tmp_path):
    for width, explorer in ((1280, axis_explorer()), (375, axis_explorer(photo=True))):
        (tmp_path / "x.html").write_text(page_of(explorer, theme), encoding="utf-8")
        page = browser.new_page(viewport={"width": width, "height": 800})
        page.goto((tmp_path / "x.html").as_uri())
        found = [v["id"] for v in Axe().run(page).response["violations"]]
        assert found == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.evaluate("document.querySelector('[role=grid]').removeAttribute('role')")
        assert Axe().run(page).response["violations"], "axe can fail"
        page.close()


def test_forced_colors_still_mark_the_cells(browser, tmp_path):
    (tmp_path / "x.html").write_text(page_of(axis_explorer()), encoding="utf-8")
    context = browser.new_context(forced_colors="active", reduced_motion="reduce")
    page = context.new_page()
    page.goto((tmp_path / "x.html").as_uri())
    style = "e => [getComputedStyle(e).borderStyle, getComputedStyle(e).transitionDuration]"
    lit = page.locator("[aria-selected=true]").first.evaluate(style)
    other = page.locator("[aria-selected=false]").first.evaluate(style)
    assert (lit, other) == (["double", "0s"], ["solid", "0s"])
    context.close()


def test_without_javascript_there_is_a_table(browser, tmp_path):
    (tmp_path / "x.html").write_text(page_of(axis_explorer()), encoding="utf-8")
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((tmp_path / "x.html").as_uri())
    text = page.inner_text(".axis-explorer")
    assert "(0, 2, 3)" in text
    x = tensor({"shape": (2, 2, 2, 2), "photo": False})
    for mean, var in zip(x.mean(axis=(0, 2, 3)), x.var(axis=(0, 2, 3)), strict=True):
        assert f"{mean:.3f}" in text and f"{var:.3f}" in text
    context.close()


# --- The helper -----------------------------------------------------------------------------------


def compressed(html):
    own = re.sub(r"<table>.*</table>", "", html)
    return len(gzip.compress(own.encode(), 9))


def test_explorer_is_small_and_the_same_every_time():
    html = axis_explorer()._repr_html_()
    assert html == axis_explorer()._repr_html_()
    assert compressed(html) <= LARGEST
    assert (
        compressed(html + base64.b64encode(np.random.default_rng(0).bytes(3000)).decode()) > LARGEST
    )
    assert not re.search(r"https?:|//[a-z]|import\s|</script>.*</script>", html)


def test_module_is_one_for_anywidget():
    explorer = axis_explorer()
    assert isinstance(explorer, AxisExplorer)
    assert re.search(r"^export default \{ render", explorer.esm, re.MULTILINE)
    for axis, shades in AXIS_COLORS.items():
        assert f"--ax-{axis.lower()}:var(--axis-{axis.lower()},{shades.light})" in explorer.css
        assert f"--ax-{axis.lower()}:{shades.dark}" in explorer.css


def test_helper_begins_where_it_is_told(browser, tmp_path):
    state = {
        "norm": "group",
        "photo": False,
        "shape": (1, 6, 2, 3),
        "groups": 3,
        "at": (0, 5, 1, 2),
    }
    explorer = axis_explorer("group", (1, 6, 2, 3), groups=3, at=(0, 5, 1, 2))
    assert explorer.fragment == fragment(state)
    (tmp_path / "x.html").write_text(page_of(explorer), encoding="utf-8")
    page = browser.new_page()
    page.goto((tmp_path / "x.html").as_uri())
    assert shown_problems(state, page.evaluate(READ)) == []
    page.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"norm": "spectral"}, "spectral"),
        ({"shape": (2, 2, 2)}, r"\(2, 2, 2\)"),
        ({"shape": (5, 2, 2, 2)}, r"\(5, 2, 2, 2\)"),
        ({"shape": (2, 0, 2, 2)}, r"\(2, 0, 2, 2\)"),
        ({"groups": 3}, "C = 2, got 3"),
        ({"groups": 0}, "got 0"),
        ({"at": (0, 0, 0, 2)}, r"got \(0, 0, 0, 2\)"),
        ({"at": (0,)}, r"got \(0,\)"),
    ],
)
def test_helper_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        axis_explorer(**arguments)
