// The table of the rows: searched, filtered by hand and by the slider, sorted, opened, saved.
(() => {
  const { data, at, count, element, textNodes } = report;
  const samples = data.samples;
  if (!samples) return;
  const PAGE = 25;
  const MOST_ID = 120;  // characters of an id in the table; all of it is in the details, the search and the file
  const DIGITS = { score: 8, loss: 4 };  // saturated scores differ only in late digits
  const columns = [  // name, title, whether it is a number, whether a narrow screen shows it in the details only
    ["row", "row", true, false],
    ["id", "id", false, true],
    ["score", "score", true, false],
    ["loss", "loss", true, true],
    ["num_tokens", "tokens", true, true],
    ["decision", "decision", false, false],
    ["epochs", "trained in", false, true],
    ["group", "group", false, true],
    ["reason", "reason", false, true],
  ].filter(([name]) => samples[name]);
  const WHAT_IF = ["keeps", "drops", "changes"];  // choices of what to show at the slider's share
  const state = { sort: "score", down: true, page: 0, open: new Set(), share: null };
  const haystack = samples.row.map((_, i) => ["prompt", "completion", "group", "id"].map((name) => samples[name]?.[i]).filter(Boolean).join("\n").toLowerCase());

  function written(name, value) {
    if (value === null) return "–";
    if (name !== "score" || !data.share) return Number.isInteger(value) ? String(value) : value.toPrecision(DIGITS[name]);
    const share = (100 * value) / data.share.full_step;
    const away = Math.abs(100 - share);  // as many digits as tell it from 100 %
    const digits = data.share.decimals ?? (away > 0 ? Math.min(Math.max(1 - Math.floor(Math.log10(away)), 1), 12) : 1);
    return `${share.toFixed(digits)} %`;
  }

  // The decision at the slider's share; null before the slider was moved.
  function decisionAtShare(i) {
    return state.share === null ? null : samples.kept_from[i] <= state.share ? "kept" : "dropped";
  }

  function isShown(i, choice) {
    if (!choice) return true;
    if (!WHAT_IF.includes(choice)) return samples.decision[i] === choice;
    const there = decisionAtShare(i);
    return choice === "changes" ? there !== samples.decision[i] : there === { keeps: "kept", drops: "dropped" }[choice];
  }

  function filtered() {
    const wanted = at("search").value.trim().toLowerCase();
    const position = /^#\d+$/.test(wanted) ? Number(wanted.slice(1)) : null;
    const [decision, group] = [at("decision").value, at("group").value];
    const found = samples.row.map((_, i) => i).filter((i) =>
      (position !== null ? samples.row[i] === position : haystack[i].includes(wanted)) &&
      isShown(i, decision) &&
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

  function block(kind, nodes, title, row) {
    const made = element("div", undefined, { class: `text ${kind}`, dir: "auto", "aria-label": `${title} of row ${row}`, role: "group", tabindex: "0" });
    made.append(...nodes);
    return [element("h3", title), made];
  }

  function shown(text) {
    const made = element("bdi");
    made.append(...textNodes(text ?? ""));
    return made;
  }

  // The epochs that trained on a row, as circles: ● for each that did.
  function circles(epochs) {
    const trained = [...epochs].flatMap((each, i) => (each === "●" ? [i + 1] : []));
    return element("span", epochs, { role: "img", "aria-label": trained.length ? `epochs ${trained.join(", ")}` : "no epoch" });
  }

  function content(i, name, numeric) {
    const value = samples[name][i];
    return numeric ? written(name, value) : name === "epochs" ? circles(value) : shown(value);
  }

  function inTable(i, name, numeric) {
    const long = name === "id" && samples.id[i].length > MOST_ID;
    return name === "decision" ? decided(i) : long ? `${samples.id[i].slice(0, MOST_ID)}…` : content(i, name, numeric);
  }

  // All that is known of a row, also what a narrow screen has no column for.
  function facts(i) {
    const made = element("dl", undefined, { class: "facts" });
    for (const [name, title, numeric] of columns) {
      const value = samples[name][i];
      if (value === null || value === "") continue;
      const text = element("dd", content(i, name, numeric));
      if (name === "score" && data.share) text.append(` of a full step (${value.toPrecision(8)})`);
      const fact = element("div", element("dt", title));
      fact.append(text);
      made.append(fact);
    }
    return made;
  }

  function life(i) {
    const visits = samples.life?.[i] ?? [];
    if (!visits.length) return [];
    const head = element("tr");
    head.append(...["epoch", "step", "loss", "resonance"].map((name) => element("th", name, { scope: "col", class: "number" })));
    const body = element("tbody");
    for (const [epoch, step, loss, resonance] of visits) {
      const line = element("tr", undefined, { class: "visit" });
      const numbers = [epoch, count(step), loss === null ? "–" : loss.toPrecision(4), resonance === null ? "–" : written("score", resonance)];
      line.append(...numbers.map((each) => element("td", String(each), { class: "number" })));
      body.append(line);
    }
    const table = element("table", element("thead", head), { "aria-label": `When row ${samples.row[i]} was trained` });
    table.append(body);
    return [element("h3", "When it was trained"), table];
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
    const cell = element("div", facts(i), { class: "inside" });
    const row = samples.row[i];
    if (samples.prompt?.[i]) cell.append(...block("prompt", textNodes(samples.prompt[i]), "Prompt", row));
    if (samples.tokens[i]) cell.append(...block("completion", tokenNodes(samples.tokens[i]), "Completion", row));
    else if (samples.completion) cell.append(...block("completion", textNodes(samples.completion[i]), "Completion", row));
    if (samples.cut[i]) cell.append(element("p", `${count(samples.cut[i])} more characters are not shown.`));
    cell.append(...life(i));
    const first = samples.copy_of[i];
    const alike = element("p");
    if (first !== row) alike.append("Same text as ", samples.row.includes(first) ? rowLink(first) : `row ${count(first)}, which is not shown`, ". ");
    if (samples.neighbours[i].length) {
      alike.append("Most similar rows shown: ");
      samples.neighbours[i].forEach(([other, similarity]) => alike.append(rowLink(other, similarity), " "));
    }
    cell.append(alike);
    const line = element("tr", undefined, { class: "details" });
    line.append(element("td", cell, { colspan: columns.length + 2 }));
    return line;
  }

  function decided(i) {
    const there = decisionAtShare(i);
    const made = element("span", samples.decision[i], { class: samples.decision[i] });
    return there === null || there === samples.decision[i] ? made : element("span", `${there} at ${state.share} %`, { class: there });
  }

  function summaryLine(i) {
    const line = element("tr");
    const open = state.open.has(i);
    const button = element("button", element("span", open ? "–" : "+", { "aria-hidden": "true" }), { type: "button", "aria-expanded": String(open), "aria-label": `Row ${samples.row[i]}` });
    button.addEventListener("click", () => {
      if (!state.open.delete(i)) state.open.add(i);
      show();
      document.querySelector(`[aria-label="Row ${samples.row[i]}"]`).focus();
    });
    line.append(element("td", button));
    for (const [name, , numeric, later] of columns) {
      const kind = [numeric ? "number" : name, later ? "later" : ""].filter(Boolean).join(" ");
      line.append(element("td", inTable(i, name, numeric), { class: kind }));
    }
    if (samples.prompt) {
      const snippet = element("td", undefined, { class: "snippet", dir: "auto" });
      snippet.append(...textNodes((samples.completion[i] || samples.prompt[i]).slice(0, 120)));
      line.append(snippet);
    }
    return line;
  }

  function header() {
    const cells = [element("td", "")];
    for (const [name, title, numeric, later] of columns) {
      const sorted = state.sort === name;
      const button = element("button", `${title}${sorted ? (state.down ? " ▼" : " ▲") : ""}`, { type: "button" });
      button.addEventListener("click", () => {
        state.down = sorted ? !state.down : true;
        state.sort = name;
        update();
        document.querySelector(`#samples th[data-name="${name}"] button`).focus();
      });
      const kind = [numeric ? "number" : "", later ? "later" : ""].filter(Boolean).join(" ");
      cells.push(element("th", button, { scope: "col", class: kind, "data-name": name, "aria-sort": sorted ? (state.down ? "descending" : "ascending") : "none" }));
    }
    if (samples.prompt) cells.push(element("th", "text", { scope: "col", class: "later" }));
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
      const formula = typeof value === "string" && /^[=+\-@\t\r]/.test(text) && !/^[+-]?\d+(\.\d+)?$/.test(text);
      const safe = formula ? `'${text}` : text;  // else a spreadsheet computes it
      return /[",\n\r]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
    };
    const texts = ["prompt", "completion"].filter((name) => samples[name]);
    const names = [...columns.map(([name]) => name), ...texts, ...(samples.cut.some(Boolean) ? ["cut"] : [])];  // cut: characters that are missing
    const lines = [names.join(","), ...found.map((i) => names.map((name) => quoted(samples[name][i])).join(","))];
    const link = element("a", "", { download: "samples.csv", href: URL.createObjectURL(new Blob([lines.join("\n") + "\n"], { type: "text/csv" })) });
    link.click();
    URL.revokeObjectURL(link.href);
  }

  // The slider: the table shows the rows that its share drops, and can show those that it keeps or that change.
  function setShare(choice) {
    state.share = Number(at("keep").value);
    const names = { keeps: `kept at ${state.share} %`, drops: `dropped at ${state.share} %`, changes: `changed at ${state.share} %` };
    for (const [value, name] of Object.entries(names)) {
      const option = at("decision").querySelector(`[value="${value}"]`) ?? at("decision").appendChild(element("option", "", { value }));
      option.textContent = name;
    }
    if (choice || !WHAT_IF.includes(at("decision").value)) at("decision").value = choice ?? "drops";
    update();
  }

  if (at("keep")) {
    at("keep").addEventListener("input", () => setShare());
    at("what-if-show").addEventListener("click", () => setShare("changes"));
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
