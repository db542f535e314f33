/* The list of a page's sections marks the one that is read, in whatever part of it one is, and keeps
   the mark in view. The theme's own marks a section only while its heading is near. */
(() => {
  const links = [...document.querySelectorAll("#pst-page-toc-nav a[href^='#']")];
  const sections = links.map((a) => document.getElementById(decodeURIComponent(a.hash.slice(1))));
  const box = document.querySelector(".bd-sidebar-secondary");
  if (!box || !links.length || sections.includes(null)) return;
  let marked, asked;

  function mark() {
    asked = false;
    // The line that a heading must have passed: below the bar at the top, and in the last window of
    // the page down to its foot, so that every section has its turn.
    const left = document.documentElement.scrollHeight - scrollY - innerHeight;
    const line = 150 + (innerHeight - 150) * Math.max(0, 1 - left / innerHeight);
    const passed = sections.filter((e) => e.getBoundingClientRect().top <= line).length;
    const now = links[Math.max(0, passed - 1)];
    if (now === marked) return;
    marked = now;
    for (const link of links) {
      const on = link === now || link.parentElement.contains(now);
      link.classList.toggle("active", on);
      link.parentElement.classList.toggle("active", on);
      link.toggleAttribute("aria-current", link === now);
    }
    const at = now.getBoundingClientRect(), room = box.getBoundingClientRect();
    const bottom = Math.min(room.bottom, innerHeight);
    if (at.top < room.top + 60 || at.bottom > bottom - 60)
      box.scrollTop += at.top - (room.top + bottom) / 2;
  }

  function ask() {
    if (!asked) requestAnimationFrame(mark);
    asked = true;
  }
  addEventListener("scroll", ask, { passive: true });
  addEventListener("resize", ask);
  ask();
})();
