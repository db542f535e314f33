"""What the axis explorer shows is NumPy's, what it paints is the groups, and no mouse is needed."""

from __future__ import annotations

import base64
import gzip
import io
import itertools
import re
from collections import Counter

import numpy as np
import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from PIL import Image

import bnlib
from bnlib.book.colors import AXIS_COLORS, INK, PAGE
from bnlib.book.datasets import photographs
from bnlib.book.explorer import AxisExplorer, axis_explorer

LIMITS = (4, 6, 4, 4)
NORMS = ("batch", "layer", "instance", "group", "pixel", "broadcast")
LARGEST = 8 * 1024  # bytes of script and style sheet, compressed


def page_of(explorer, theme="light"):
    colors = ";".join(f"--axis-{a.lower()}:{getattr(c, theme)}" for a, c in AXIS_COLORS.items())
    page, ink = getattr(PAGE, theme), getattr(INK, theme)
    return (
        f'<!doctype html><html lang="en" data-theme="{theme}"><meta charset="utf-8">'
        '<title>Explorer</title><meta name="viewport" content="width=device-width">'
        f"<style>html{{{colors};--pst-color-background:{page};--pst-color-text-base:{ink}}}"
        f"body{{background:{page};color:{ink};margin:16px}} a{{color:inherit}}</style>"
        f"<main><h1>Explorer</h1>{explorer._repr_html_()}</main>"
    )


def opened(browser, folder, explorer, theme="light", width=900, height=900, **options):
    path = folder / "explorer.html"
    path.write_text(page_of(explorer, theme), encoding="utf-8")
    context = browser.new_context(viewport={"width": width, "height": height}, **options)
    page = context.new_page()
    page.set_default_timeout(5000)
    page.goto(path.as_uri())
    return page


@pytest.fixture(scope="module")
def page(browser, tmp_path_factory):
    page = opened(browser, tmp_path_factory.mktemp("explorer"), axis_explorer())
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text))
    yield page
    assert problems == []
    page.context.close()


# --- What NumPy says ------------------------------------------------------------------------------


def photo_bytes():
    thumbnails = []
    for name in ("flower", "astronaut"):
        photo = photographs()[name].astype(np.float64)
        top, left = ((side - 252) // 2 for side in photo.shape[1:])
        square = photo[:, top : top + 252, left : left + 252]
        means = square.reshape(3, 7, 36, 7, 36).mean(axis=(2, 4))
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
    i = np.arange(np.prod(shape), dtype=np.uint64)
    mixed = ((i + 11) * 2654435761 % 2**32) >> 28
    return (mixed.reshape(shape) % 6 + np.indices(shape)[1] % 4).astype(float)


def numbered(*axes):
    """Different numbers for different places along these axes, from 0."""
    return np.unique(np.stack([a.ravel() for a in axes]), axis=1, return_inverse=True)[1].reshape(
        axes[0].shape
    )


def expected(state):
    """For every cell: the mean that it loses, the mean that it enters, all means, variances and
    outputs; None where NumPy refuses ``x - mean``."""
    x, norm = tensor(state), state["norm"]
    n, c, h, w = np.indices(x.shape)
    taken = enters = {
        "batch": lambda: numbered(c),
        "layer": lambda: numbered(n),
        "instance": lambda: numbered(n, c),
        "group": lambda: numbered(n, c // (x.shape[1] // state["groups"])),
        "pixel": lambda: numbered(c, h, w),
        "broadcast": lambda: c,
    }[norm]()
    count = enters.max() + 1
    mean = np.array([x[enters == k].mean() for k in range(count)])
    var = np.array([x[enters == k].var() for k in range(count)])
    if norm == "broadcast":
        try:
            if (x - mean).shape != x.shape:
                return None
        except ValueError:
            return None
        taken = np.broadcast_to(np.arange(count), x.shape)
    y = (x - mean[taken]) / np.sqrt(var[taken] + 1e-5)
    return {"taken": taken, "enters": enters, "mean": mean, "var": var, "y": y}


def random_states(count, seed):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        photo = bool(rng.random() < 0.15)
        shape = (
            (int(rng.integers(1, 3)), 3, 7, 7)
            if photo
            else tuple(int(rng.integers(1, most + 1)) for most in LIMITS)
        )
        divisors = [g for g in range(1, shape[1] + 1) if shape[1] % g == 0]
        yield {
            "norm": str(rng.choice(NORMS)),
            "photo": photo,
            "after": bool(rng.random() < 0.4),
            "shape": shape,
            "groups": int(rng.choice(divisors)),
            "at": None if rng.random() < 0.3 else tuple(int(rng.integers(d)) for d in shape),
        }


def state_of(norm, shape, *, groups=1, at=None, photo=False, after=False):
    return {
        "norm": norm, "shape": shape, "groups": groups, "at": at, "photo": photo, "after": after
    }  # fmt: skip


def fragment(state):
    words = ["#explore", state["norm"]]
    words += [word for word in ("photo", "after") if state[word]]
    words += [f"{a}{d}" for a, d in zip("NCHW", state["shape"], strict=True)]
    words += [f"G{state['groups']}"]
    words += [f"{a}{i}" for a, i in zip("nchw", state["at"] or (), strict=bool(state["at"]))]
    return "-".join(words)


# --- What the page says ---------------------------------------------------------------------------

READ = """() => {
  const cells = [...document.querySelectorAll("[role=gridcell]")];
  const text = (selector) => document.querySelector(selector).textContent;
  return {
    cells: cells.map((c) => [c.ariaLabel, c.ariaSelected, c.textContent, c.className]),
    stops: cells.filter((c) => c.tabIndex === 0).map((c) => c.ariaLabel),
    numbers: Object.fromEntries(
      [...document.querySelectorAll("[data-of]")].map((b) => [b.dataset.of, b.textContent])),
    means: [...document.querySelectorAll("[aria-live] li")].map((li) => li.textContent),
    live: text("[aria-live]"),
    says: text(".ax-says"),
    link: document.querySelector(".ax-foot a").getAttribute("href"),
    code: text(".ax-code"),
  };
}"""
LABEL = re.compile(
    r"(.+) at n=(\d+), c=(\d+), h=(\d+), w=(\d+)(?:, mean (\d+))?(, in the mean)?", re.ASCII
)


def number(text):
    return float(text.replace("\u2212", "-"))


def shown_problems(state, seen):
    """Where what the page shows is not what NumPy says."""
    x, answer, at = tensor(state), expected(state), state["at"]
    if len(seen["cells"]) != x.size:
        return [f"{len(seen['cells'])} cells are shown of {x.size}"]
    problems = []
    values = answer["y"] if state["after"] and answer else x
    for label, selected, text, look in seen["cells"]:
        value, *place, group, source = LABEL.fullmatch(label).groups()
        q = tuple(map(int, place))
        mine = at is not None and answer is not None
        on = mine and answer["taken"][q] == answer["taken"][at]
        dashed = mine and state["norm"] == "broadcast" and (
            answer["enters"][q] == answer["taken"][at]
        )  # fmt: skip
        told = [
            (abs(number(value) - values[q]) < 0.0005 + 1e-9, "another value is heard"),
            (state["photo"] or abs(number(text) - values[q]) < 0.05 + 1e-9, "another is shown"),
            (group == (str(answer["taken"][q]) if answer else None), "another mean is heard"),
            (selected == str(bool(on)).lower(), "selected, or not"),
            (bool(source) == dashed == ("ax-from" in look), "dashed, or not"),
            (("ax-off" in look) == (answer is None or (mine and not on)), "coloured, or not"),
            (("ax-me" in look) == (at == q), "chosen, or not"),
        ]
        problems += [f"cell {q}, {label!r}, {look!r}: {what}" for right, what in told if not right]
    stop = at or (0, 0, 0, 0)
    if [tuple(map(int, LABEL.fullmatch(s).groups()[1:5])) for s in seen["stops"]] != [stop]:
        problems.append(f"the tab stops are {seen['stops']}")
    if answer is None:
        if seen["numbers"] or "does not fit" not in seen["says"]:
            problems.append(f"NumPy refuses, and the page says {seen['says']!r}")
        return problems
    count = len(answer["mean"])
    each = x.size // count
    wanted = f": {count} mean{'s' * (count > 1)}, each of {each} value{'s' * (each > 1)}."
    if not seen["says"].endswith(wanted):
        problems.append(f"the sentence is {seen['says']!r}, expected {wanted!r} at its end")
    if at is None:
        means = [number(m) for m in seen["means"][:8]]
        if len(means) != min(count, 8) or np.abs(means - answer["mean"][:8]).max() > 0.005 + 1e-9:
            problems.append(f"the means are {seen['means']}")
        return problems
    k = answer["taken"][at]
    numbers = {
        "count": (answer["enters"] == k).sum(),
        "mean": answer["mean"][k],
        "variance": answer["var"][k],
        "value": x[at],
        "y": answer["y"][at],
    }
    if set(seen["numbers"]) != set(numbers):
        return [*problems, f"the page shows the numbers {seen['numbers']}"]
    return problems + [
        f"{key} is {value}, the page shows {seen['numbers'][key]}"
        for key, value in numbers.items()
        if abs(number(seen["numbers"][key]) - value) > 0.0005 + 1e-9
    ]


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
        assert shown_problems(state, follow(page, state)) == [], state
        kinds.add((state["norm"], state["photo"], state["at"] is None))
    assert len(kinds) > 20, "every norm, with numbers and with photographs, at rest and chosen"


def test_comparison_can_fail(page):
    state = state_of("group", (2, 4, 2, 3), groups=2, at=(1, 2, 0, 1))
    seen = follow(page, state)
    assert shown_problems(state, seen) == []
    for change in ({"norm": "layer"}, {"at": (1, 2, 0, 2)}, {"at": None}, {"after": True}):
        assert shown_problems(state | change, seen)
    seen["numbers"]["variance"] = "0.123"
    assert shown_problems(state, seen)


def test_numbers_are_those_of_the_layers(page):
    """Independent of the groups above: the output of PyTorch's and bnlib's own layers."""
    functional = torch.nn.functional
    axes, split = bnlib.reduction_axes, bnlib.split_groups
    layers = {
        "batch": (lambda x, g: functional.batch_norm(x, None, None, training=True), axes(4)),
        "layer": (lambda x, g: functional.layer_norm(x, x.shape[1:]), axes(4, norm="layer")),
        "instance": (lambda x, g: functional.instance_norm(x), axes(4, norm="instance")),
        "group": (lambda x, g: functional.group_norm(x, g), axes(5, norm="instance")),
        "pixel": (lambda x, g: functional.batch_norm(x.flatten(1), None, None, training=True), 0),
    }
    compared = Counter()
    for state in random_states(90, seed=2):
        n, c, h, w = state["shape"]
        if state["at"] and state["norm"] in layers and min(h * w, n * h * w, c * h * w, n) > 1:
            theirs, over = layers[state["norm"]]
            x, g = torch.from_numpy(tensor(state)), state["groups"]
            y = bnlib.standardize(split(x, g) if state["norm"] == "group" else x, over)
            torch.testing.assert_close(y.reshape(x.shape), theirs(x, g).reshape(x.shape))
            shown = follow(page, state)
            difference = number(shown["numbers"]["y"]) - y.reshape(x.shape)[state["at"]].item()
            assert abs(difference) < 0.0006, state
            written = re.search(r"axis=\(([\d, ]+)\)", shown["code"])[1].strip(", ")
            assert written == ", ".join(map(str, np.atleast_1d(over))), "the library's axes"
            compared[state["norm"]] += 1
    assert len(compared) == 5 and min(compared.values()) > 2, compared


def test_code_runs_and_gives_the_means_that_are_shown(page):
    for state in random_states(40, seed=3):
        seen = follow(page, state | {"at": None})
        shape, mean, *_ = seen["code"].splitlines()
        assert shape == f"x.shape  # {state['shape']}"
        names = {"x": tensor(state)}
        exec(mean, names)
        if expected(state):
            shown = [number(text) for text in seen["means"][:8]]
            assert np.abs(names["mean"].ravel()[:8] - shown).max() < 0.006, (state, mean)


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
        assert words[1] == "batch"
        shape = tuple(found[a] for a in "NCHW")
        at = tuple(found[a] for a in "nchw") if "n" in found else None
        state = state_of("batch", shape, groups=found["G"], at=at, photo="photo" in words)
        assert shown_problems(state, page.evaluate(READ)) == []


# --- What is painted ------------------------------------------------------------------------------


def painted(page):
    """The most frequent colour of every cell on the screen, as RGB."""
    page.wait_for_timeout(300)  # a change of colour takes its time
    places = page.evaluate(
        """() => [...document.querySelectorAll("[role=gridcell]")].map((cell) => {
          const box = cell.getBoundingClientRect();
          return [cell.at, box.left + scrollX, box.top + scrollY, box.width, box.height];
        })"""
    )
    shot = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
    pixels = np.asarray(shot)
    colors = {}
    for at, left, top, width, height in places:
        inner = pixels[round(top) + 4 : round(top + height) - 4, round(left) + 4 :]
        inner = inner[:, : round(width) - 8].reshape(-1, 3)
        colors[tuple(at)] = Counter(map(tuple, inner.tolist())).most_common(1)[0][0]
    return colors


def oklab(rgb):
    """Lightness and the two opponent colours (Ottosson, 2020)."""
    c = np.array(rgb) / 255
    c = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    to_cones = [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
    to_lab = [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
    return np.array(to_lab) @ np.cbrt(np.array(to_cones) @ c)


def hue(rgb):
    _, a, b = oklab(rgb)
    return np.degrees(np.arctan2(b, a)) % 360


def chroma(rgb):
    return np.hypot(*oklab(rgb)[1:])


SHAPES = {
    "batch": (2, 4, 2, 4), "layer": (3, 2, 2, 2), "instance": (2, 3, 1, 3),
    "group": (2, 4, 2, 2), "pixel": (2, 2, 2, 2), "broadcast": (2, 4, 2, 4),
}  # fmt: skip


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("norm", NORMS)
def test_at_rest_a_group_is_one_colour_and_no_other(browser, tmp_path, norm, theme):
    state = state_of(norm, SHAPES[norm], groups=2)
    page = opened(browser, tmp_path, axis_explorer(norm, SHAPES[norm], groups=None), theme)
    answer, colors = expected(state | {"groups": 2 - SHAPES[norm][1] % 2}), painted(page)
    by_group = {}
    for at, color in colors.items():
        by_group.setdefault(int(answer["taken"][at]), set()).add(color)
    assert len(by_group) == len(answer["mean"]) <= 8
    assert all(len(group) == 1 for group in by_group.values())
    only = [next(iter(group)) for group in by_group.values()]
    assert (
        min(np.linalg.norm(oklab(a) - oklab(b)) for a, b in itertools.combinations(only, 2)) > 0.05
    )
    page.context.close()


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("norm", NORMS[:4])
def test_a_photograph_is_painted_in_the_colours_of_its_groups(browser, tmp_path, norm, after):
    """The hue tells the group, the lightness tells the value."""
    explorer = axis_explorer(norm, photo=True, after=after)
    page = opened(browser, tmp_path, explorer, height=1200)
    state = state_of(norm, (2, 3, 7, 7), groups=3, photo=True)
    answer, colors = expected(state), painted(page)
    hues = {}
    for at, color in colors.items():
        if 0.35 < oklab(color)[0] < 0.85 and chroma(color) > 0.06:  # a screen has no darker blue
            hues.setdefault(int(answer["taken"][at]), []).append(hue(color))
    assert set(hues) == set(range(len(answer["mean"])))
    spread = {k: (np.ptp(values), np.median(values)) for k, values in hues.items()}
    assert all(width < 25 for width, _ in spread.values()), spread
    middles = sorted(middle for _, middle in spread.values())
    assert min(np.diff([*middles, middles[0] + 360])) > 25
    values = answer["y"] if after else tensor(state)
    cells = list(colors)
    lightness = [oklab(colors[at])[0] for at in cells]
    assert np.corrcoef(lightness, [values[at] for at in cells])[0, 1] > 0.95
    page.context.close()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("photo", [False, True])
def test_the_chosen_group_alone_keeps_its_colour(browser, tmp_path, photo, theme):
    explorer = axis_explorer("instance", (2, 2, 2, 3), at=(1, 0, 0, 1), photo=photo)
    page = opened(browser, tmp_path, explorer, theme, height=1200)
    for at, color in painted(page).items():
        if at != (1, 0, 0, 1) and 0.3 < oklab(color)[0] < 0.95:
            assert (chroma(color) > 0.03) == (at[:2] == (1, 0)), (at, color)
    page.context.close()


def test_photographs_stand_above_in_their_colours(page):
    """Before, the photograph itself; after, the three outputs as red, green and blue."""
    pixels_of = "(canvas) => canvas.toDataURL().split(',')[1]"
    for after in (False, True):
        state = state_of("instance", (2, 3, 7, 7), photo=True, after=after)
        follow(page, state)
        wanted = 128 + 55 * expected(state)["y"] if after else tensor(state)
        for n in range(2):
            png = base64.b64decode(page.locator("canvas").nth(n).evaluate(pixels_of))
            seen = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).transpose(2, 0, 1)
            assert np.abs(seen - np.clip(wanted[n], 0, 255)).max() <= 1


# --- Keys, mouse, ears ----------------------------------------------------------------------------


def test_keyboard_only(page):
    """One tab stop in the grid; arrows, Home and End reach every cell; the numbers follow."""
    state = state_of("group", (2, 4, 2, 3), groups=2)
    follow(page, state)
    page.focus("[name$=norm]:checked")
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
        "Enter": (0, 0),
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
    page.keyboard.press("Escape")
    assert shown_problems(state, page.evaluate(READ)) == [], "all groups are shown again"
    page.focus("[name$=norm]:checked")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.value") == "pixel", "arrows choose the norm"
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "ax-code"


def test_mouse_touch_and_menus(page):
    follow(page, state_of("batch", (2, 4, 2, 4), groups=2, at=(0, 0, 0, 0)))
    page.click("text=Sizes")
    for name, value in (("N", "3"), ("C", "4"), ("H", "2"), ("W", "2")):
        page.select_option(f"select[name={name}]", value)
    assert page.is_hidden("select[name=G]")
    page.check("[value=group]", force=True)
    assert page.locator("select[name=G] option").all_text_contents() == ["1", "2", "4"]
    state = state_of("group", (3, 4, 2, 2), groups=2, at=(1, 2, 1, 0))
    page.click("[aria-label*='n=1, c=2, h=1, w=0']")
    page.mouse.move(1, 1)
    assert shown_problems(state, page.evaluate(READ)) == []
    page.hover("[aria-label*='n=2, c=0, h=0, w=1']")
    assert "Cell n=2, c=0, h=0, w=1" in page.evaluate(READ)["live"], "a mouse shows what it is on"
    page.mouse.move(1, 1)
    assert shown_problems(state, page.evaluate(READ)) == [], "and no more when it has left"
    page.check("[value=after]", force=True)
    assert shown_problems(state | {"after": True}, page.evaluate(READ)) == []
    page.click("text=Show all")
    page.mouse.move(1, 1)
    state |= {"after": True, "at": None}
    assert shown_problems(state, page.evaluate(READ)) == []
    page.check("[value=photo]", force=True)
    state |= {"photo": True, "shape": (2, 3, 7, 7), "groups": 3}
    assert shown_problems(state, page.evaluate(READ)) == []
    page.click("text=Sizes")


def test_group_norm_begins_with_two_groups(page):
    for before in (state_of("batch", (2, 4, 2, 4)), state_of("layer", (2, 6, 1, 1), groups=1)):
        follow(page, before)
        page.check("[value=group]", force=True)
        state = before | {"norm": "group", "groups": 2}
        assert shown_problems(state, page.evaluate(READ)) == []


def test_accessibility_tree_says_which_cells_share_a_mean(page):
    """Reading the tree alone: from the cells' names, and from two sentences."""
    follow(page, state_of("group", (2, 4, 1, 2), groups=2, at=(1, 2, 0, 1)))
    tree = page.locator("main").aria_snapshot()
    lit = re.findall(r'gridcell "\d+ at ([^"]*), mean 3" \[selected\]', tree)
    assert sorted(lit) == [f"n=1, c={c}, h=0, w={w}" for c, w in itertools.product((2, 3), (0, 1))]
    for needed in (
        'figure "Axis explorer: which cells share one mean"',
        'radio "Group norm" [checked]',
        'radio "Per pixel mistake"',
        'columnheader "sample 1"',
        'rowheader "channel 2"',
        "Each sample has one mean for every 2 channels, over rows and columns",
        "Cell n=1, c=2, h=0, w=1",
    ):
        assert re.sub(r"\W+", "", needed) in re.sub(r"\W+", "", tree), tree
    assert page.get_attribute("[aria-live]", "aria-atomic") == "true"


def test_accessibility_tree_says_where_the_mean_is_subtracted(page):
    follow(page, state_of("broadcast", (1, 2, 1, 2), at=(0, 0, 0, 1)))
    tree = page.locator(".axis-explorer").aria_snapshot()
    cells = re.findall(r'gridcell "\d+ at n=0, ([^"]*)"( \[selected\])?', tree)
    assert cells == [
        ("c=0, h=0, w=0, mean 0", ""),
        ("c=0, h=0, w=1, mean 1", " [selected]"),
        ("c=1, h=0, w=0, mean 0, in the mean", ""),
        ("c=1, h=0, w=1, mean 1, in the mean", " [selected]"),
    ]


# The cell of the two questions: which cells share its mean, and can the answer be seen?
SEEN = """(cell) => {
  const big = document.querySelector("[aria-live]");
  const free = (el, x, y) => el.contains(document.elementFromPoint(x, y));
  const within = (box) => box.top >= 0 && box.bottom <= innerHeight;
  const [a, b] = [cell.getBoundingClientRect(), big.getBoundingClientRect()];
  return within(a) && within(b)
    && [a.top + 1, a.bottom - 1].every((y) => free(cell, a.left + 5, y))
    && [b.top + 10, b.bottom - 10].every((y) => free(big, b.left + 5, y));
}"""


@pytest.mark.parametrize(("width", "height"), [(1280, 720), (375, 700)])
@pytest.mark.parametrize("name", ["intro.html", "axes/which-axes.html"])
def test_answer_is_on_the_screen_while_the_keys_move(browser, site, name, width, height):
    """In the book's own pages, from the top of the page, with the keyboard alone."""
    context = browser.new_context(viewport={"width": width, "height": height})
    page = context.new_page()
    page.goto((site / "book" / name).as_uri())
    here = "document.activeElement.value || document.activeElement.getAttribute('role')"
    for _ in range(200):
        page.keyboard.press("Tab")
        if page.evaluate(here) == "batch":
            break
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert page.evaluate(here) == "group"
    page.keyboard.press("Tab")
    assert page.evaluate(here) == "gridcell"
    keys = ["ArrowRight"] * 3 + ["ArrowDown"] * 4
    for key in keys + ["ArrowDown"] * 3 + ["ArrowUp"] * 7 + ["ArrowDown"] * 4:
        page.keyboard.press(key)
        assert page.locator(":focus").evaluate(SEEN), page.locator(":focus").aria_snapshot()
    state = state_of("group", (2, 4, 2, 4), groups=2, at=(0, 2, 0, 3))
    assert shown_problems(state, page.evaluate(READ)) == []
    page.mouse.wheel(0, 10_000)
    page.wait_for_function("scrollY > 1500")
    assert not page.locator(":focus").evaluate(SEEN), "the check can fail"
    context.close()


@pytest.mark.parametrize("width", [375, 1280])
@pytest.mark.parametrize(
    "explorer",
    [axis_explorer(), axis_explorer(photo=True), axis_explorer("pixel", LIMITS)],
    ids=repr,
)
def test_a_finger_hits_one_cell_and_the_page_does_not_scroll(browser, tmp_path, explorer, width):
    page = opened(browser, tmp_path, explorer, width=width)
    box = page.locator("[role=gridcell]").first.bounding_box()
    assert min(box["width"], box["height"]) >= 24
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    grid = page.locator("[role=grid]")
    hidden = grid.evaluate("(grid) => grid.scrollWidth - grid.clientWidth") > 0
    assert hidden == page.is_visible("text=slide sideways")
    assert hidden == ("N4" in explorer.fragment and width == 375)
    if hidden:
        page.locator("[role=gridcell][tabindex='0']").focus()
        page.keyboard.press("Control+End")
        assert grid.evaluate("(grid) => grid.scrollLeft") > 0
    page.context.close()


def test_the_cells_stay_where_they_are_when_one_is_chosen(browser, tmp_path):
    for photo in (False, True):
        page = opened(browser, tmp_path, axis_explorer(photo=photo), width=375)
        cell = page.locator("[role=gridcell]").nth(5)
        before = cell.bounding_box()
        cell.click()
        page.wait_for_selector(".ax-me")
        assert cell.bounding_box() == before
        page.context.close()


def test_controls_are_one_row_on_a_telephone(browser, tmp_path):
    page = opened(browser, tmp_path, axis_explorer(), width=375)
    for row in (".ax-norm label", ".ax-foot > *"):
        tops = page.evaluate(
            "(row) => [...document.querySelectorAll(row)]"
            ".map((e) => e.getBoundingClientRect().top)",
            row,
        )
        assert len(tops) >= 3 and np.ptp(tops) < 2, row
    sizes = page.evaluate(
        "[...document.querySelectorAll('.axis-explorer *')].filter((e) => e.innerText)"
        ".map((e) => parseFloat(getComputedStyle(e).fontSize))"
    )
    assert min(sizes) >= 11
    page.context.close()


def test_current_cell_is_told_from_its_group_and_from_the_focus(page):
    for state in (
        state_of("group", (2, 4, 2, 2), groups=2, at=(1, 2, 0, 1)),
        state_of("layer", (2, 3, 7, 7), groups=3, at=(1, 2, 0, 1), photo=True),
    ):
        follow(page, state)
        style = """(cell) => {
          const { outlineStyle, outlineColor, boxShadow } = getComputedStyle(cell);
          return [outlineStyle, outlineColor, boxShadow].join();
        }"""
        page.focus("[name$=norm]:checked")
        current = page.locator("[role=gridcell][tabindex='0']")
        lit = page.locator("[aria-selected=true]:not([tabindex='0'])").first
        looks = {lit.evaluate(style), current.evaluate(style)}
        page.keyboard.press("Tab")
        current.focus()
        looks.add(current.evaluate(style))
        assert len(looks) == 3, looks


def test_mouse_at_rest_leaves_the_keys_alone(browser, tmp_path):
    """A page that scrolls under the mouse must not move the chosen cell."""
    page = opened(browser, tmp_path, axis_explorer("layer", LIMITS), width=375, height=420)
    page.evaluate("scrollTo(0, 350)")
    page.mouse.move(200, 250)
    assert page.inner_text("[aria-live]").startswith("Cell "), "the mouse shows a cell"
    page.focus("[role=gridcell][tabindex='0']")
    for key in ("Control+Home", "Control+End"):
        page.keyboard.press(key)
        page.wait_for_timeout(300)
    assert page.inner_text("[aria-live]").startswith("Cell n=3, c=5, h=3, w=3")
    page.context.close()


def test_jupyterlab_leaves_the_keys_to_the_explorer(page):
    """Its shortcuts stop at this attribute of the focused element; else "dd" deletes a cell."""
    stops = page.locator(".axis-explorer").locator("input, select, a, [tabindex]")
    assert stops.count() > 10
    assert stops.evaluate_all("(all) => all.every((el) => 'lmSuppressShortcuts' in el.dataset)")


def test_two_explorers_of_a_page_do_not_disturb_each_other(browser, tmp_path):
    path = tmp_path / "x.html"
    second = axis_explorer("layer", at=(1, 0, 0, 0))._repr_html_()
    path.write_text(page_of(axis_explorer()) + second, encoding="utf-8")
    page = browser.new_page()
    page.goto(path.as_uri())
    checked = page.locator("input[name$=norm]:checked")
    assert checked.evaluate_all("(all) => all.map((e) => e.value)") == ["batch", "layer"]
    page.close()


def test_paper_has_the_answer_and_no_menus(page):
    follow(page, state_of("group", (2, 4, 2, 2), groups=2, at=(1, 2, 0, 1)))
    page.emulate_media(media="print")
    assert page.is_hidden(".ax-foot") and page.is_hidden("text=Show all")
    assert page.inner_text(".ax-says").startswith("Each sample has one mean for every 2 channels")
    assert "of 8 cells" in page.inner_text("[aria-live]")
    page.emulate_media(media="screen")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_no_accessibility_violation(browser, theme, tmp_path):
    explorers = (
        (1280, axis_explorer()),
        (375, axis_explorer(photo=True)),
        (375, axis_explorer("broadcast", at=(0, 1, 0, 2), after=True)),
        (900, axis_explorer("pixel")),
    )
    for width, explorer in explorers:
        page = opened(browser, tmp_path, explorer, theme, width=width)
        page.wait_for_timeout(200)
        assert [v["id"] for v in Axe().run(page).response["violations"]] == []
        page.evaluate("document.querySelector('[role=grid]').removeAttribute('role')")
        assert Axe().run(page).response["violations"], "axe can fail"
        page.context.close()


def test_forced_colors_keep_the_groups_and_motion_can_be_reduced(browser, tmp_path):
    options = {"forced_colors": "active", "reduced_motion": "reduce"}
    page = opened(browser, tmp_path, axis_explorer(at=(0, 1, 0, 0)), **options)
    colors = painted(page)
    assert chroma(colors[1, 1, 1, 1]) > 0.03 > chroma(colors[1, 2, 1, 1])
    cell = page.locator("[role=gridcell]").first
    assert cell.evaluate("(e) => getComputedStyle(e).transitionDuration") == "0s"
    page.context.close()


def test_without_javascript_there_is_a_table(browser, tmp_path):
    page = opened(browser, tmp_path, axis_explorer(), java_script_enabled=False)
    text = page.inner_text(".axis-explorer")
    assert "(0, 2, 3)" in text
    x = tensor({"shape": (2, 2, 2, 2), "photo": False})
    for mean, var in zip(x.mean(axis=(0, 2, 3)), x.var(axis=(0, 2, 3)), strict=True):
        assert f"{mean:.3f}" in text and f"{var:.3f}" in text
    page.context.close()


# --- The helper -----------------------------------------------------------------------------------


def compressed(html):
    own = re.sub(r"<table>.*</table>", "", html)
    return len(gzip.compress(own.encode(), 9))


def test_explorer_is_small_and_the_same_every_time():
    html = axis_explorer()._repr_html_()
    assert html == axis_explorer()._repr_html_()
    assert compressed(html) <= LARGEST
    more = base64.b64encode(np.random.default_rng(0).bytes(3000)).decode()
    assert compressed(html + more) > LARGEST
    assert not re.search(r"https?:|//[a-z]|import\s|</script>.*</script>", html)


def test_module_is_one_for_anywidget():
    explorer = axis_explorer()
    assert isinstance(explorer, AxisExplorer)
    assert re.search(r"^export default \{ render", explorer.esm, re.MULTILINE)
    for axis, shades in AXIS_COLORS.items():
        assert f"--ax-{axis.lower()}:var(--axis-{axis.lower()},{shades.light})" in explorer.css
        assert f"--ax-{axis.lower()}:{shades.dark}" in explorer.css


def test_helper_begins_where_it_is_told(browser, tmp_path):
    for state, explorer in (
        (
            state_of("group", (1, 6, 2, 3), groups=3, at=(0, 5, 1, 2)),
            axis_explorer("group", (1, 6, 2, 3), groups=3, at=(0, 5, 1, 2)),
        ),
        (state_of("batch", (2, 4, 2, 4), groups=2), axis_explorer()),
        (
            state_of("layer", (2, 3, 7, 7), groups=3, photo=True, after=True),
            axis_explorer("layer", photo=True, after=True),
        ),
    ):
        assert explorer.fragment == fragment(state)
        page = opened(browser, tmp_path, explorer)
        assert shown_problems(state, page.evaluate(READ)) == []
        page.context.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"norm": "spectral"}, "spectral"),
        ({"shape": (2, 2, 2)}, r"\(2, 2, 2\)"),
        ({"shape": (5, 2, 2, 2)}, r"\(5, 2, 2, 2\)"),
        ({"shape": (2, 0, 2, 2)}, r"\(2, 0, 2, 2\)"),
        ({"groups": 3}, "C = 4, got 3"),
        ({"groups": 0}, "got 0"),
        ({"at": (0, 0, 0, 4)}, r"got \(0, 0, 0, 4\)"),
        ({"at": (0,)}, r"got \(0,\)"),
    ],
)
def test_helper_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        axis_explorer(**arguments)
