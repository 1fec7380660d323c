"use strict";
// Draws the charts, and says what another share would do. Text from a dataset only becomes text nodes, never markup.
const report = (() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const count = (number) => number.toLocaleString("en-US");

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

  // Light and dark: the charts' colours are those of the style sheet, so that nothing is drawn again --------------
  const root = document.documentElement;
  const prefersDark = window.matchMedia("(prefers-color-scheme: dark)");

  function setTheme(dark) {
    root.dataset.theme = dark ? "dark" : "light";
    at("theme").setAttribute("aria-pressed", String(dark));
  }

  at("theme").addEventListener("click", () => setTheme(root.dataset.theme !== "dark"));
  prefersDark.addEventListener("change", (event) => setTheme(event.matches));
  setTheme(prefersDark.matches);

  // Charts, each as wide as its place, also when the window changes ------------------------------------------------
  function draw([name, chart]) {
    const fitted = { ...chart, width: "container", autosize: { type: "fit-x", contains: "padding" } };
    const options = { actions: false, renderer: "svg", mode: "vega-lite", config: data.config };
    const target = at(`chart-${name}`);
    return target && vegaEmbed(target, fitted, options).then((made) => {
      target.querySelector("svg").setAttribute("aria-hidden", "true");  // its place has the name of the whole chart
      made.view.addEventListener("click", (event, item) => showSpike(item?.datum?.spike));
    });
  }

  function showSpike(step) {
    const rows = step === undefined ? null : at(`spike-${step}`);
    if (!rows) return;
    rows.open = true;
    rows.scrollIntoView({ block: "nearest" });
    rows.querySelector("summary").focus({ preventScroll: true });
  }

  Promise.all(Object.entries(data.charts).map(draw)).then(() => { root.dataset.drawn = "true"; });

  // What if -------------------------------------------------------------------------------------------------------
  const whatIf = data.what_if;

  function showWhatIf() {
    const index = Number(at("keep").value) - 1;
    const kept = whatIf.rows[index];
    at("keep-shown").value = `${at("keep").value} %`;
    at("what-if-keep").textContent = (at("keep").value / 100).toFixed(2);
    at("what-if-rows").textContent = count(kept);
    if (whatIf.tokens) at("what-if-tokens").textContent = count(whatIf.tokens[index]);
    at("what-if-dropped").textContent = count(whatIf.rows[99] - kept + whatIf.unscored);
    const table = at("what-if-groups");
    if (!table) return;
    const lines = Object.entries(whatIf.dropped_of_groups).map(([name, dropped]) => {
      const line = element("tr");
      const numbers = [dropped[index], whatIf.size_of_groups[name]].map((each) => element("td", count(each), { class: "number" }));
      line.append(element("td", element("bdi", name)), ...numbers);
      return line;
    });
    table.tBodies[0].replaceChildren(...lines);
  }

  if (whatIf && at("keep")) {
    at("keep").addEventListener("input", showWhatIf);
    showWhatIf();
  }

  for (const reason of document.querySelectorAll("#reasons bdi")) reason.replaceChildren(...textNodes(reason.textContent));

  return { data, at, count, element, textNodes };
})();
