"""How the page of an evaluation looks, by day and by night, on a screen and on a phone."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #fbfbf9; --card: #ffffff; --text: #1d2126; --soft: #5d6670; --line: #e0e2e0;
  --single: #1f6fb4; --pair: #c8640a; --policy: #2c8a4b;
  --gain: #1c7a3e; --none: #6a727b; --loss: #b3372f;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171a; --card: #1c2024; --text: #e6e8ea; --soft: #9aa4ae; --line: #30363c;
    --single: #6fb1ec; --pair: #f0a052; --policy: #6cc98a;
    --gain: #6cc98a; --none: #9aa4ae; --loss: #f0857c;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
}
main { max-width: 1200px; margin: 0 auto; padding: 28px 20px 64px; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0; }
h2 { font-size: 1.3rem; margin: 2.4em 0 .6em; padding-top: .8em;
  border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.2em 0 .3em; }
p, ul { max-width: 74ch; }
ul { padding-left: 1.2em; margin: .3em 0; }
li { margin: .25em 0; }
.name, .note, figcaption { color: var(--soft); }
.name { margin: .2em 0 1.4em; font-size: 1.05rem; overflow-wrap: anywhere; }
.note, figcaption, .legend { font-size: .86rem; }
.cards { display: grid; gap: 14px; margin: 1.4em 0;
  grid-template-columns: repeat(auto-fit, minmax(225px, 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  border-top: 4px solid var(--tone); padding: 14px 16px; }
.card h3 { margin: 0; font-size: .86rem; font-weight: 600; color: var(--soft); }
.card .big { margin: .15em 0 .3em; font-size: 1.55rem; font-weight: 650; line-height: 1.2;
  color: var(--tone); }
.card p { margin: 0; font-size: .88rem; overflow-wrap: anywhere; }
.gain { --tone: var(--gain); } .none { --tone: var(--none); } .loss { --tone: var(--loss); }
li.gain::marker, li.none::marker, li.loss::marker { color: var(--tone); }
td.gain, td.none, td.loss { color: var(--tone); font-weight: 600; }
.charts { display: grid; gap: 14px; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); }
.small.charts { grid-template-columns: repeat(auto-fit, minmax(240px, 1fr)); }
.small.charts figure { max-width: 350px; }
figure { margin: 0; padding: 8px; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }
figcaption { padding: 2px 8px 4px; }
svg { display: block; width: 100%; height: auto; font-family: inherit; }
svg text { fill: var(--text); font-size: 12px; }
svg .tick { fill: var(--soft); font-size: 11.5px; }
svg .axis { fill: var(--soft); }
svg .grid { stroke: var(--line); fill: none; }
svg .single { fill: var(--single); stroke: var(--single); }
svg .pair { fill: var(--pair); stroke: var(--pair); }
svg .policy { fill: var(--policy); stroke: var(--policy); }
svg g { stroke-width: 0; fill-opacity: .85; }
svg .bar { stroke-width: 1; stroke-opacity: .45; }
svg .label { stroke: var(--card); stroke-width: 3px; paint-order: stroke; font-weight: 600; }
svg .alone, svg .front, svg .curve, svg .chance { fill: none; stroke-width: 2; }
svg .alone { stroke: var(--single); }
svg .front { stroke: var(--soft); stroke-dasharray: 5 4; stroke-width: 1.4; }
svg .curve.token { stroke: var(--policy); }
svg .curve.line { stroke: var(--pair); }
svg .chance { stroke: var(--soft); stroke-dasharray: 2 4; stroke-width: 1.2; }
.legend { display: flex; flex-wrap: wrap; gap: .3em 1.4em; color: var(--soft); max-width: none; }
.legend span { display: inline-flex; align-items: center; gap: .45em; }
svg.key { width: 15px; height: 15px; flex: none; }
.legend .line { display: inline-block; width: 22px; border-top: 2px solid var(--single); }
.legend .front { border-top: 2px dashed var(--soft); }
.legend .token { border-color: var(--policy); } .legend .by-line { border-color: var(--pair); }
.legend .chance { border-top: 2px dotted var(--soft); }
details { margin: .7em 0; }
summary { cursor: pointer; font-weight: 600; padding: .25em 0; }
.table { overflow-x: auto; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }
table { border-collapse: collapse; width: 100%; font-size: .84rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: 5px 8px; text-align: right; vertical-align: top; }
th { color: var(--soft); font-weight: 600; border-bottom: 1px solid var(--line);
  vertical-align: bottom; }
tbody tr + tr td { border-top: 1px solid color-mix(in srgb, var(--line) 55%, transparent); }
th.text, td.text { text-align: left; min-width: 9ch; }
td.text { overflow-wrap: anywhere; }
td small { display: block; color: var(--soft); font-weight: 400; font-size: .92em; }
.sample { margin: 1.2em 0; padding-left: 14px; border-left: 3px solid var(--line); }
.sample p { margin: .2em 0; } .sample details { margin: .2em 0; }
.sample summary { font-weight: 400; font-size: .9rem; overflow-wrap: anywhere; }
.sample span { color: var(--tone); font-weight: 600; }
.said, code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: .82rem; }
.said { white-space: pre-wrap; overflow-wrap: anywhere; max-width: none; }
.sample details .said { background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; padding: 8px 10px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25em 1em; font-size: .9rem; }
dt { font-weight: 600; } dd { margin: 0; overflow-wrap: anywhere; }
.facts dd { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: .82rem; }
@media (max-width: 760px) {
  /* Rows as cards: no column is cut, however narrow the page. */
  thead { display: none; }
  table, tbody, tr, td { display: block; }
  tr { padding: 6px 10px; }
  tbody tr + tr { border-top: 2px solid var(--line); }
  tbody tr + tr td { border-top: 0; }
  th, td, th.text, td.text { padding: 2px 0; text-align: left; min-width: 0; }
  td::before { content: attr(data-label) ": "; color: var(--soft); font-weight: 400; }
  td:empty { display: none; }
}
@media (max-width: 560px) {
  main { padding: 18px 14px 48px; }
  h1 { font-size: 1.55rem; }
  .charts { grid-template-columns: 1fr; }
  figure { padding: 4px; }
  svg .axis, svg .tick { font-size: 14px; }
  .small.charts svg .axis, .small.charts svg .tick { font-size: 12px; }
  dl { grid-template-columns: 1fr; } dd { margin-bottom: .4em; }
}
"""
