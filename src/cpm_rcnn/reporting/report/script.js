"use strict";

// Tables: sorting by a column, folding, and search in the first column.
function prepareTable(table) {
  const body = table.tBodies[0];
  const tools = table.parentElement.nextElementSibling;
  const button = tools && tools.querySelector(".unfold");
  const search = tools && tools.querySelector(".find");
  const shown = Number(table.dataset.first);
  let unfolded = !button;

  function update() {
    const words = search ? search.value.trim().toLowerCase() : "";
    let number = 0;
    for (const row of body.rows) {
      const matches = !words || row.cells[0].textContent.toLowerCase().includes(words);
      row.classList.toggle("gone", !matches);
      if (matches) number += 1;
      row.classList.toggle("extra", matches && number > shown);
    }
    table.classList.toggle("folded", !unfolded);
    if (button) {
      button.hidden = number <= shown;
      button.textContent = unfolded ? "Show the first " + shown : "Show all " + number.toLocaleString("en") + " " + button.dataset.what;
    }
  }

  function value(row, column) {
    const cell = row.cells[column];
    if (column === 0) return cell.textContent.toLowerCase();
    return cell.dataset.value === undefined ? null : Number(cell.dataset.value);
  }

  function sort(column, heading) {
    const first = column === 0 ? "ascending" : "descending";
    const other = column === 0 ? "descending" : "ascending";
    const order = heading.getAttribute("aria-sort") === first ? other : first;
    table.querySelectorAll("[aria-sort]").forEach((each) => each.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", order);
    const sign = order === "ascending" ? 1 : -1;
    const rows = [...body.rows].map((row) => [value(row, column), row]);
    rows.sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null);  // undefined values last in both orders
      return sign * (column === 0 ? a.localeCompare(b) : a - b);
    });
    body.append(...rows.map(([, row]) => row));
    update();
  }

  const headings = [...table.tHead.rows].at(-1).cells;
  [...headings].forEach((heading, column) => {
    const control = heading.querySelector("button");
    if (control) control.addEventListener("click", () => sort(column, heading));
  });
  if (button) button.addEventListener("click", () => { unfolded = !unfolded; update(); });
  if (search) search.addEventListener("input", update);
  update();
}

// Galleries: a class and a kind hide all other boxes, and the cards without any match.
function prepareGallery(section) {
  const controls = section.querySelector(".filters");
  if (!controls) return;
  const cards = [...section.querySelectorAll(".card")];
  const [byClass, byKind] = ["class", "kind"].map((name) => controls.querySelector(`[data-filter=${name}]`));

  function matches(element) {
    const { class: name, annotated, kind } = element.dataset;
    return (!byClass.value || name === byClass.value || annotated === byClass.value) && (!byKind.value || kind === byKind.value);
  }

  function update() {
    let number = 0;
    for (const card of cards) {
      const parts = [...card.querySelectorAll("[data-kind]")];
      parts.forEach((part) => part.classList.toggle("gone", !matches(part)));
      const filtered = byClass.value || byKind.value;
      const visible = card.dataset.kind !== undefined ? matches(card) : !filtered || parts.some(matches);
      card.classList.toggle("gone", !visible);
      number += visible;
    }
    const what = controls.dataset.of + (cards.length === 1 ? "" : "s");
    controls.querySelector("output").textContent = `${number} of ${cards.length} ${what}`;
  }

  byClass.addEventListener("change", update);
  byKind.addEventListener("change", update);
  update();
}

// The enlarged picture of a card. Its list explains the boxes; a pointer on an entry or on a box shows it alone.
function prepareViewer(dialog) {
  const content = dialog.querySelector(".content");
  let current = null;

  function show(card) {
    current = card;
    const copy = card.cloneNode(true);
    copy.removeAttribute("id");
    const frame = copy.querySelector(".frame");
    for (const name of ["role", "tabindex", "aria-label"]) frame.removeAttribute(name);
    content.replaceChildren(copy);
    if (!dialog.open) dialog.showModal();
    content.scrollTop = 0;
    fit();
    let kept = null;
    const pick = (number) => {
      copy.classList.toggle("picking", number !== null);
      copy.querySelectorAll("[data-number]").forEach((each) => each.classList.toggle("on", each.dataset.number === number));
    };
    for (const entry of copy.querySelectorAll(".items li")) {
      entry.addEventListener("pointerenter", (event) => { if (event.pointerType === "mouse") pick(entry.dataset.number); });
      entry.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") pick(kept); });
      entry.addEventListener("click", () => { kept = kept === entry.dataset.number ? null : entry.dataset.number; pick(kept); });
    }
  }

  // Text has the same size on the screen for images of all sizes.
  function fit() {
    const overlay = content.querySelector(".overlay");
    if (!overlay || !overlay.clientWidth) return;
    const { width, height } = overlay.viewBox.baseVal;
    overlay.style.setProperty("--unit", Math.max(width / overlay.clientWidth, height / overlay.clientHeight));
  }

  function move(step) {
    const cards = [...current.parentElement.children].filter((card) => !card.classList.contains("gone"));
    show(cards[(cards.indexOf(current) + step + cards.length) % cards.length]);
  }

  for (const frame of document.querySelectorAll("main .frame")) {
    const open = () => show(frame.closest(".card"));
    frame.addEventListener("click", open);
    frame.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); open(); }
    });
  }
  dialog.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    if (button.dataset.move) move(Number(button.dataset.move));
    else dialog.close();
  });
  dialog.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") move(-1);
    if (event.key === "ArrowRight") move(1);
  });
  dialog.addEventListener("close", () => content.replaceChildren());
  window.addEventListener("resize", fit);
}

// Curves of the chosen class. Values are two digits of base 36 each, of 0 to 1295; spaces are undefined.
function prepareCurves(select) {
  if (!select) return;
  const data = JSON.parse(document.getElementById("curve-data").textContent);
  const charts = document.getElementById("curve-charts");
  const empty = document.getElementById("curve-empty");

  function decode(text) {
    const values = [];
    for (let i = 0; i < text.length; i += 2) values.push(text[i] === " " ? null : parseInt(text.slice(i, i + 2), 36) / 1295);
    return values;
  }

  function draw(chart, series) {
    const [left, top, width, height, xLow, xHigh, yLow, yHigh] = chart.dataset.plot.split(" ").map(Number);
    const targets = chart.querySelector(".targets");
    targets.replaceChildren();
    let known = 0;
    for (const path of chart.querySelectorAll("path[data-key]")) {
      const values = decode(series[path.dataset.key]);
      const positions = path.dataset.key in { f1: 1, precision_at: 1, recall_at: 1 } ? data.thresholds : data.recalls;
      const name = path.querySelector("title").textContent;
      let line = "";
      let pen = "M";
      values.forEach((value, i) => {
        if (value === null) { pen = "M"; return; }
        const x = left + width * (positions[i] - xLow) / (xHigh - xLow);
        const y = top + height * (1 - (value - yLow) / (yHigh - yLow));
        line += `${pen}${x.toFixed(1)} ${y.toFixed(1)}` + (pen === "M" ? "h0" : "");
        pen = "L";
        known += 1;
        if (i % 5) return;
        const target = document.createElementNS("http://www.w3.org/2000/svg", "circle");
        for (const [key, number] of Object.entries({ cx: x, cy: y, r: 7 })) target.setAttribute(key, number.toFixed(1));
        target.setAttribute("class", "target");
        const title = document.createElementNS("http://www.w3.org/2000/svg", "title");
        title.textContent = `${name}: ${(100 * value).toFixed(1)} % at ${positions[i].toFixed(2)}`;
        target.append(title);
        targets.append(target);
      });
      path.setAttribute("d", line);
    }
    return known;
  }

  select.addEventListener("change", () => {
    const drawn = [...charts.querySelectorAll("svg.chart[data-plot]")].map((chart) => draw(chart, data.series[select.value]));
    const known = drawn.some((number) => number > 0);
    charts.hidden = !known;
    empty.hidden = known;
  });
}

// The navigation marks the section that is being read.
function prepareNavigation(nav) {
  const links = new Map([...nav.querySelectorAll("a")].map((link) => [link.hash.slice(1), link]));
  const headings = [...document.querySelectorAll("main h2")];
  let marked = null;
  function update() {
    const top = nav.getBoundingClientRect().bottom + 24;
    const past = headings.filter((heading) => heading.getBoundingClientRect().top <= top);
    const link = past.length ? links.get(past.at(-1).id) : null;
    if (link === marked) return;
    if (marked) marked.classList.remove("here");
    marked = link;
    if (!link) return;
    link.classList.add("here");
    const list = nav.firstElementChild;
    list.scrollLeft = link.offsetLeft - (list.clientWidth - link.clientWidth) / 2;
  }
  window.addEventListener("scroll", update, { passive: true });
  update();
}

document.querySelectorAll("table.foldable").forEach(prepareTable);
document.querySelectorAll(".gallery").forEach(prepareGallery);
prepareViewer(document.getElementById("viewer"));
prepareCurves(document.getElementById("curve-class"));
prepareNavigation(document.querySelector("nav"));
