"use strict";
(() => {
  const { palettes, charts } = JSON.parse(document.getElementById("charts").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const touch = matchMedia("(pointer: coarse)").matches;
  const paper = matchMedia("print");
  const divs = [...document.querySelectorAll(".chart")];
  const hidden = Object.fromEntries(divs.map((div) => [div.id, new Set()]));
  const config = {
    displayModeBar: touch ? false : "hover", // a finger cannot hover: it would always cover a part of the chart
    displaylogo: false,
    responsive: false, // it forgets the width set for paper
    modeBarButtons: [["toImage", "resetScale2d"]],
    toImageButtonOptions: { scale: 2 },
  };
  let printing = paper.matches;

  function paint(part, palette) {
    if (Array.isArray(part)) return part.some((item) => typeof item === "object") ? part.map((item) => paint(item, palette)) : part;
    if (part === null || typeof part !== "object") return part;
    return Object.fromEntries(
      Object.entries(part).map(([key, value]) => [key, key.endsWith("color") && Object.hasOwn(palette, value) ? palette[value] : paint(value, palette)]),
    );
  }

  function draw(div) {
    const palette = palettes[dark.matches && !printing ? "dark" : "light"];
    const data = paint(charts[div.id].data, palette);
    const layout = paint(charts[div.id].layout, palette);
    for (const trace of data) trace.visible = !hidden[div.id].has(trace.meta);
    // A finger that drags over a chart scrolls the page.
    layout.dragmode = touch ? false : "zoom";
    layout.autosize = !printing;
    if (printing) Object.assign(layout, { width: Number(div.dataset.print), height: div.clientHeight });
    Plotly.react(div, data, layout, config);
  }

  function drawAll() {
    divs.forEach(draw);
  }

  function print(on) {
    if (on === printing) return;
    printing = on;
    drawAll();
  }

  function toggle(button) {
    const { chart, name } = button.dataset;
    const show = button.getAttribute("aria-pressed") === "false";
    button.setAttribute("aria-pressed", show);
    hidden[chart][show ? "delete" : "add"](name);
    draw(document.getElementById(chart));
  }

  function sort(table, header) {
    const heads = [...table.tHead.rows[0].cells];
    const column = heads.indexOf(header);
    const numeric = header.classList.contains("number");
    const before = header.getAttribute("aria-sort");
    const order = before === "descending" || (before === "none" && !numeric) ? "ascending" : "descending";
    for (const head of heads) if (head.hasAttribute("aria-sort")) head.setAttribute("aria-sort", head === header ? order : "none");
    const collator = new Intl.Collator("en", { numeric: true });
    const compare = numeric ? (a, b) => a - b : collator.compare;
    const key = (row) => row.cells[column].dataset.key;
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      if (key(a) === undefined || key(b) === undefined) return (key(a) === undefined) - (key(b) === undefined);
      return compare(key(a), key(b)) * (order === "ascending" ? 1 : -1);
    });
    table.tBodies[0].append(...rows);
  }

  drawAll();
  dark.addEventListener("change", drawAll);
  paper.addEventListener("change", (event) => print(event.matches));
  addEventListener("beforeprint", () => print(true));
  addEventListener("afterprint", () => print(false));
  let frame = 0;
  addEventListener("resize", () => {
    cancelAnimationFrame(frame);
    // Not Plotly.Plots.resize: that waits 100 ms, and may then undo the width set for paper.
    frame = requestAnimationFrame(() => printing || divs.forEach((div) => Plotly.relayout(div, { autosize: true })));
  });
  for (const button of document.querySelectorAll(".legend button")) button.addEventListener("click", () => toggle(button));
  for (const table of document.querySelectorAll("table.sortable"))
    for (const button of table.tHead.querySelectorAll("button")) button.addEventListener("click", () => sort(table, button.parentElement));
})();
