"""How the page looks: system fonts, one column, light and dark by the reader's preference, plain on paper."""

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c1e21; --quiet: #5f6670; --line: #e2e5e9; --wash: #f5f6f8;
  --series-1: #0072b2; --series-2: #d55e00; --good: #00694e; }
@media (prefers-color-scheme: dark) { :root { --paper: #14161a; --ink: #e6e8eb; --quiet: #9aa3ad; --line: #2c3138;
  --wash: #1c2026; --series-1: #56b4e9; --series-2: #e69f00; --good: #4fd1a5; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1040px; padding: 40px 24px 80px; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3em; }
h2 { font-size: 1.35rem; margin: 0 0 .3em; }
h3 { font-size: 1.05rem; margin: 1.8em 0 .5em; }
section { margin-top: 56px; padding-top: 28px; border-top: 1px solid var(--line); }
p { margin: 0 0 .8em; max-width: 46em; }
.look, .quiet, figcaption, .note { color: var(--quiet); }
.look { margin-bottom: 1.6em; }
.note { font-size: .92rem; border-left: 3px solid var(--line); padding-left: .8em; }
.chain { display: flex; flex-wrap: wrap; gap: 8px; list-style: none; margin: 1.4em 0; padding: 0; }
.chain li { border: 1px dashed var(--line); border-radius: 6px; padding: 3px 10px;
  color: var(--quiet); font-size: .92rem; }
.chain .done { border: 1px solid var(--good); color: var(--good); }
.chain .done::before { content: "\\2713\\00a0"; }
.scroll { overflow-x: auto; margin: 0 0 1.2em; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: 5px 18px 5px 0; border-bottom: 1px solid var(--line); }
th { color: var(--quiet); font-weight: 500; vertical-align: bottom; }
th, td { overflow-wrap: normal; }
td bdi { display: block; min-width: min-content; overflow-wrap: anywhere; }
td:has(bdi) { min-width: 10em; }
.n { text-align: right; }
td.n { white-space: nowrap; }
code, .key { font: .9em ui-monospace, SFMono-Regular, Menlo, monospace; }
figure { margin: 0 0 1.4em; }
figcaption { font-size: .9rem; line-height: 1.4; margin-top: 6px; }
svg { display: block; width: 100%; max-width: 480px; height: auto; }
img { display: block; max-width: 100%; height: auto; border-radius: 6px; background: var(--wash);
  outline: 1px solid var(--line); outline-offset: -1px; }
img.pixels { image-rendering: pixelated; }
.samples, .thumbs { display: grid; gap: 22px 18px; }
.beside { display: grid; grid-template-columns: minmax(0, 480px) minmax(0, 1fr); gap: 0 32px; align-items: start; }
.samples { grid-template-columns: repeat(auto-fill, minmax(min(100%, 290px), 1fr)); }
.samples figure > img, .thumbs img, .previews img { width: 100%; }
.samples figcaption { display: flex; gap: 10px; color: var(--ink); }
.samples figcaption img { width: 64px; height: 64px; flex: none; }
.samples .quiet { display: block; font-size: .85rem; }
.thumbs { grid-template-columns: repeat(auto-fill, minmax(96px, 1fr)); margin-bottom: 1.6em; }
.strips { display: grid; gap: 22px 14px; grid-template-columns: repeat(auto-fill, 104px); margin-bottom: 1.6em; }
.strips img { width: 104px; height: auto; }
.strips figure { margin: 0; }
.strips figcaption { font-size: .8rem; }
.thumbs img { aspect-ratio: 1; object-fit: contain; }
.thumbs figure, .previews figure, .samples figure { margin: 0; }
.thumbs figcaption { font-size: .8rem; }
.previews { display: flex; flex-wrap: wrap; gap: 18px; margin: 0 0 1.4em; }
.previews figure { flex: 1 1 220px; max-width: 512px; }
details { margin: 1em 0; }
summary { cursor: pointer; }
@media (max-width: 860px) { .beside { grid-template-columns: minmax(0, 1fr); } }
@media (max-width: 480px) { body { padding: 24px 16px 48px; } section { margin-top: 40px; }
  th, td { padding-right: 12px; } }
@media print { :root { --paper: #fff; --ink: #000; --quiet: #444; --line: #ccc; --good: #00694e; --series-1: #0072b2;
  --series-2: #d55e00; } body { max-width: none; padding: 0; font-size: 11pt; } figure, tr { break-inside: avoid; }
  h2, h3 { break-after: avoid; } .scroll { overflow: visible; } }
"""
