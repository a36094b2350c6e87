(function () {
  "use strict";
  const root = document.documentElement;
  const KEY = "pathkernel-report-theme";
  root.classList.add("js");

  function stored() {
    try { return window.sessionStorage.getItem(KEY); } catch (error) { return null; }
  }
  function store(theme) {
    try { window.sessionStorage.setItem(KEY, theme); } catch (error) { /* a page without storage forgets */ }
  }
  const known = stored();
  if (known === "dark" || known === "light") root.dataset.theme = known;

  function dark() {
    return root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  }

  function themes(button) {
    const show = () => button.setAttribute("aria-pressed", String(dark()));
    button.addEventListener("click", () => {
      root.dataset.theme = dark() ? "light" : "dark";
      store(root.dataset.theme);
      show();
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
    button.hidden = false;
    show();
  }

  function tabs(list) {
    const all = Array.from(list.querySelectorAll("[role=tab]"));
    const choose = (chosen, focus) => {
      for (const tab of all) {
        const on = tab === chosen;
        tab.setAttribute("aria-selected", String(on));
        tab.tabIndex = on ? 0 : -1;
        document.getElementById(tab.getAttribute("aria-controls")).hidden = !on;
      }
      if (focus) chosen.focus();
    };
    list.addEventListener("click", (event) => {
      const tab = event.target.closest("[role=tab]");
      if (tab) choose(tab, false);
    });
    list.addEventListener("keydown", (event) => {
      const at = all.indexOf(document.activeElement);
      const to = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: -1 }[event.key];
      if (at < 0 || to === undefined) return;
      event.preventDefault();
      choose(all[(to + all.length) % all.length], true);
    });
    choose(all[0], false);
  }

  function value(row, column) {
    const cell = row.cells[column];
    const given = cell.dataset.value;
    return given === undefined ? cell.textContent.trim() : given;
  }
  function sorting(table) {
    const heads = Array.from(table.tHead.rows[0].cells);
    table.tHead.addEventListener("click", (event) => {
      const button = event.target.closest("button.sort");
      if (!button) return;
      const head = button.closest("th");
      const column = heads.indexOf(head);
      const before = head.getAttribute("aria-sort") || button.dataset.otherwise || "descending";
      const down = before === "ascending";
      for (const each of heads) each.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const body = table.tBodies[0];
      const rows = Array.from(body.rows).map((row) => [value(row, column), row]);
      const numbers = rows.every(([text]) => text !== "" && !Number.isNaN(Number(text)));
      rows.sort(([a], [b]) => (numbers ? Number(a) - Number(b) : a.localeCompare(b, undefined, { numeric: true })));
      if (down) rows.reverse();
      body.append(...rows.map(([, row]) => row));
    });
  }

  function chart(figure) {
    const plot = figure.querySelector(".plot");
    const at = JSON.parse(plot.dataset.at);
    const cursor = plot.querySelector(".cursor");
    const outputs = Array.from(figure.querySelectorAll("[data-texts]"));
    const step = figure.querySelector(".axis b");
    const last = [outputs.map((each) => each.textContent), step.textContent];
    const leave = () => {
      cursor.style.display = "none";
      outputs.forEach((each, k) => { each.textContent = last[0][k]; });
      step.textContent = last[1];
    };
    plot.addEventListener("pointermove", (event) => {
      const box = plot.getBoundingClientRect();
      const x = (100 * (event.clientX - box.left)) / box.width;
      let near = 0;
      at.forEach((place, k) => { if (Math.abs(place - x) < Math.abs(at[near] - x)) near = k; });
      cursor.style.display = "block";
      cursor.style.left = at[near] + "%";
      outputs.forEach((each) => { each.textContent = JSON.parse(each.dataset.texts)[near]; });
      step.textContent = JSON.parse(plot.dataset.steps)[near];
    });
    plot.addEventListener("pointerleave", leave);
  }

  document.addEventListener("DOMContentLoaded", () => {
    document.querySelectorAll("button.theme").forEach(themes);
    document.querySelectorAll("[role=tablist]").forEach(tabs);
    document.querySelectorAll("table.sortable").forEach(sorting);
    document.querySelectorAll("figure.chart.curves").forEach(chart);
  });
})();
