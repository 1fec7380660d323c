"use strict";
// Fills the page from its data. Text from a dataset only becomes text nodes, never markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const count = (number) => number.toLocaleString("en-US");
  const digits = { score: 8, loss: 5 };  // saturated scores differ only in late digits
  const short = (number, name) => (number === null ? "–" : Number.isInteger(number) ? String(number) : number.toPrecision(digits[name]));

  function element(name, content, attributes = {}) {
    const made = document.createElement(name);
    if (content !== undefined) made.append(content);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  }

  // Invisible characters and those that change the direction of text are shown by their code point. The joiners that
  // some scripts need (U+200C, U+200D) are kept.
  const HIDDEN = /([\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u115f\u1160\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\u3164\ufeff\uffa0\ufff9-\ufffb\u{e0000}-\u{e007f}])/u;

  function textNodes(text) {
    return text.replaceAll("\r\n", "\n").split(HIDDEN).map((part, i) => {
      if (i % 2 === 0) return document.createTextNode(part);
      return element("span", `U+${part.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`, { class: "invisible" });
    });
  }

  // Light and dark ------------------------------------------------------------------------------------------------
  const root = document.documentElement;
  const prefersDark = window.matchMedia("(prefers-color-scheme: dark)");

  function chartStyle(dark) {
    const [ink, line] = dark ? ["#e8e8e8", "#4a4f55"] : ["#1b1b1b", "#d9d9d9"];
    const text = { labelColor: ink, titleColor: ink };
    return { background: "transparent", view: { stroke: line }, axis: { ...text, gridColor: line, domainColor: ink, tickColor: ink }, legend: text };
  }

  function draw() {
    const config = chartStyle(root.dataset.theme === "dark");
    const drawn = Object.entries(data.charts).map(([name, chart]) => {
      const target = at(`chart-${name}`);
      const options = { actions: false, renderer: "svg", mode: "vega-lite", config };
      return target && vegaEmbed(target, structuredClone(chart), options).then((made) => {
        if (name === "timeline") made.view.addEventListener("click", (event, item) => showSpike(item?.datum?.spike));
      });
    });
    return Promise.all(drawn).then(() => { root.dataset.drawn = "true"; });
  }

  function showSpike(step) {
    const rows = at(`spike-${step}`);
    if (!rows) return;
    rows.open = true;
    rows.scrollIntoView({ block: "nearest" });
  }

  function setTheme(dark) {
    root.dataset.theme = dark ? "dark" : "light";
    return draw();
  }

  at("theme").addEventListener("click", () => setTheme(root.dataset.theme !== "dark"));
  prefersDark.addEventListener("change", (event) => setTheme(event.matches));
  setTheme(prefersDark.matches);

  // What if -------------------------------------------------------------------------------------------------------
  const whatIf = data.what_if;

  function showWhatIf() {
    const index = Number(at("keep").value) - 1;
    const kept = whatIf.rows[index];
    at("keep-shown").value = `${at("keep").value} %`;
    at("what-if-rows").textContent = count(kept);
    if (whatIf.tokens) at("what-if-tokens").textContent = count(whatIf.tokens[index]);
    at("what-if-dropped").textContent = count(whatIf.rows[99] - kept + whatIf.unscored);
    const table = at("what-if-groups");
    if (!table) return;
    const lines = Object.entries(whatIf.dropped_of_groups).map(([name, dropped]) => {
      const line = element("tr");
      line.append(element("td", element("bdi", name)), element("td", count(dropped[index])), element("td", count(whatIf.size_of_groups[name])));
      return line;
    });
    table.tBodies[0].replaceChildren(...lines);
  }

  if (whatIf && at("keep")) {
    at("keep").addEventListener("input", showWhatIf);
    showWhatIf();
  }

  for (const reason of document.querySelectorAll("#reasons bdi")) reason.replaceChildren(...textNodes(reason.textContent));

  // Samples -------------------------------------------------------------------------------------------------------
  const samples = data.samples;
  if (!samples) return;
  const PAGE = 25;
  const columns = [
    ["row", "row", true],
    ["score", "score", true],
    ["loss", "loss", true],
    ["num_tokens", "tokens", true],
    ["decision", "", false],
    ["epochs", "trained in", false],
    ["group", "group", false],
    ["reason", "reason", false],
  ].filter(([name]) => samples[name]);
  const state = { sort: "score", down: true, page: 0, open: new Set() };
  const haystack = samples.row.map((_, i) => [samples.prompt?.[i], samples.completion?.[i], samples.group?.[i]].filter(Boolean).join("\n").toLowerCase());

  function filtered() {
    const wanted = at("search").value.trim().toLowerCase();
    const position = /^#\d+$/.test(wanted) ? Number(wanted.slice(1)) : null;
    const [decision, group] = [at("decision").value, at("group").value];
    const found = samples.row.map((_, i) => i).filter((i) =>
      (position !== null ? samples.row[i] === position : haystack[i].includes(wanted)) &&
      (!decision || samples.decision[i] === decision) &&
      (!group || `=${samples.group[i]}` === group));
    const values = samples[state.sort];
    const sign = state.down ? -1 : 1;
    return found.sort((a, b) => {
      const [x, y] = [values[a], values[b]];
      if (x === null || y === null) return (x === null) - (y === null);  // rows without a value come last
      return sign * (typeof x === "number" ? x - y : String(x).localeCompare(String(y))) || samples.row[a] - samples.row[b];
    });
  }

  function tokenNodes(tokens) {
    const [texts, losses, kept] = tokens;
    const byLoss = at("colour").value === "loss";
    const most = Math.max(...losses, 1e-9);
    return texts.map((text, i) => {
      const made = element("span", undefined, { class: `token${kept[i] ? "" : " masked"}`, title: `loss ${losses[i]}, ${kept[i] ? "kept" : "masked"}` });
      made.append(...textNodes(text));
      if (byLoss) {
        made.className = "token";
        made.style.backgroundColor = `rgb(213 94 0 / ${Math.round((60 * losses[i]) / most)}%)`;
      }
      return made;
    });
  }

  function block(kind, nodes, title) {
    const made = element("div", undefined, { class: `text ${kind}`, dir: "auto", "aria-label": title, role: "region", tabindex: "0" });
    made.append(...nodes);
    return [element("div", title), made];
  }

  function rowLink(row, similarity) {
    const made = element("button", `row ${row}${similarity === undefined ? "" : ` (${similarity})`}`, { class: "link", type: "button" });
    made.addEventListener("click", () => {
      at("search").value = `#${row}`;
      at("decision").value = at("group").value = "";
      update();
    });
    return made;
  }

  function details(i) {
    const cell = element("div", undefined, { class: "inside" });
    if (samples.prompt) {
      if (samples.prompt[i]) cell.append(...block("prompt", textNodes(samples.prompt[i]), "Prompt"));
    }
    if (samples.tokens[i]) cell.append(...block("completion", tokenNodes(samples.tokens[i]), "Completion"));
    else if (samples.completion) {
      cell.append(...block("completion", textNodes(samples.completion[i]), "Completion"));
    }
    if (samples.cut[i]) cell.append(element("p", `${count(samples.cut[i])} more characters are not shown.`));
    for (const [epoch, step, loss, resonance] of samples.life?.[i] ?? []) {
      const measured = resonance === null ? "" : `, resonance ${resonance.toPrecision(4)}`;
      cell.append(element("div", `Epoch ${epoch}, step ${count(step)}: loss ${loss === null ? "–" : loss.toPrecision(4)}${measured}`, { class: "visit" }));
    }
    const first = samples.copy_of[i];
    if (first !== samples.row[i]) cell.append("Same text as ", samples.row.includes(first) ? rowLink(first) : `row ${count(first)}, which is not shown`, ". ");
    if (samples.neighbours[i].length) {
      cell.append("Most similar rows shown: ");
      samples.neighbours[i].forEach(([row, similarity]) => cell.append(rowLink(row, similarity), " "));
    }
    const line = element("tr", undefined, { class: "details" });
    line.append(element("td", cell, { colspan: columns.length + 2 }));
    return line;
  }

  function summaryLine(i) {
    const line = element("tr");
    const open = state.open.has(i);
    const button = element("button", open ? "–" : "+", { type: "button", "aria-expanded": String(open), "aria-label": `Row ${samples.row[i]}` });
    button.addEventListener("click", () => {
      if (!state.open.delete(i)) state.open.add(i);
      show();
      document.querySelector(`[aria-label="Row ${samples.row[i]}"]`).focus();
    });
    line.append(element("td", button));
    for (const [name, , numeric] of columns) {
      const value = samples[name][i];
      const cell = element("td", numeric ? short(value, name) : undefined, { class: numeric ? "number" : name === "decision" ? value : "" });
      if (!numeric) {
        const text = element("bdi");
        text.append(...textNodes(value ?? ""));
        cell.append(text);
      }
      line.append(cell);
    }
    if (samples.prompt) {
      const snippet = element("td", undefined, { class: "snippet", dir: "auto" });
      snippet.append(...textNodes((samples.completion[i] || samples.prompt[i]).slice(0, 120)));
      line.append(snippet);
    }
    return line;
  }

  function header() {
    const cells = [element("th", "", { scope: "col", "aria-label": "Open" })];
    for (const [name, title] of columns) {
      const sorted = state.sort === name;
      const button = element("button", `${title || name}${sorted ? (state.down ? " ▼" : " ▲") : ""}`, { type: "button" });
      button.addEventListener("click", () => {
        state.down = sorted ? !state.down : true;
        state.sort = name;
        update();
        document.querySelector(`#samples th[data-name="${name}"] button`).focus();
      });
      cells.push(element("th", button, { scope: "col", "data-name": name, "aria-sort": sorted ? (state.down ? "descending" : "ascending") : "none" }));
    }
    if (samples.prompt) cells.push(element("th", "completion", { scope: "col" }));
    at("samples").tHead.rows[0].replaceChildren(...cells);
  }

  let found = [];

  function show() {
    const pages = Math.max(1, Math.ceil(found.length / PAGE));
    state.page = Math.min(Math.max(state.page, 0), pages - 1);
    const lines = found.slice(state.page * PAGE, (state.page + 1) * PAGE).flatMap((i) => (state.open.has(i) ? [summaryLine(i), details(i)] : [summaryLine(i)]));
    at("samples").tBodies[0].replaceChildren(...lines);
    at("page").textContent = `page ${state.page + 1} of ${pages}`;
    at("previous").disabled = state.page === 0;
    at("next").disabled = state.page === pages - 1;
  }

  function update() {
    state.page = 0;
    found = filtered();
    at("found").textContent = `${count(found.length)} of the ${count(samples.row.length)} rows shown here`;
    header();
    show();
  }

  function saveCsv() {
    const quoted = (value) => {
      const text = value === null || value === undefined ? "" : String(value);
      const safe = typeof value === "string" && /^[=+\-@\t\r]/.test(text) ? `'${text}` : text;  // else a spreadsheet computes it
      return /[",\n\r]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
    };
    const names = columns.map(([name]) => name);
    const lines = [names.join(","), ...found.map((i) => names.map((name) => quoted(samples[name][i])).join(","))];
    const link = element("a", "", { download: "samples.csv", href: URL.createObjectURL(new Blob([lines.join("\n") + "\n"], { type: "text/csv" })) });
    link.click();
    URL.revokeObjectURL(link.href);
  }

  for (const cell of document.querySelectorAll(".spike td[data-row]")) {
    const row = Number(cell.dataset.row);
    if (!samples.row.includes(row)) continue;
    const link = rowLink(row);
    link.addEventListener("click", () => at("found").scrollIntoView({ block: "nearest" }));
    cell.replaceChildren(link);
  }
  at("group-label").hidden = !samples.group;
  at("colour-label").hidden = !samples.tokens.some(Boolean);
  for (const name of [...new Set(samples.group ?? [])].sort()) at("group").append(element("option", name || "(none)", { value: `=${name}` }));
  for (const id of ["search", "decision", "group"]) at(id).addEventListener("input", update);
  at("colour").addEventListener("input", show);
  at("filters").addEventListener("submit", (event) => event.preventDefault());
  at("csv").addEventListener("click", saveCsv);
  at("previous").addEventListener("click", () => { state.page -= 1; show(); });
  at("next").addEventListener("click", () => { state.page += 1; show(); });
  update();
})();
