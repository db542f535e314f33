/* A box that scrolls is a stop of the Tab key, one that shows everything is none. The theme measures
   every box as the page opens, which lays out the whole page; here a box is measured when the
   browser lays it out, and again when its size changes. Until then it is a stop. */
(() => {
  const skipped = { contentVisibilityAuto: true };
  const measured = new ResizeObserver((entries) => {
    for (const { target } of entries) {
      const unknown = !(target.firstElementChild ?? target).checkVisibility(skipped);
      const scrolls =
        target.scrollWidth > target.clientWidth || target.scrollHeight > target.clientHeight;
      target.tabIndex = unknown || scrolls ? 0 : -1;
    }
  });
  const boxes = "main pre, .cell_output > .output, .pst-scrollable-table-container";
  for (const box of document.querySelectorAll(boxes)) measured.observe(box);
})();
