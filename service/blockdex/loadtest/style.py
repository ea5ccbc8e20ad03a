"""How the report looks, in light and in dark."""

from __future__ import annotations

STYLE = """
:root {
  --page: #f6f7f9; --card: #ffffff; --text: #1b2430; --soft: #5d6b7c; --line: #dfe4ea;
  --good: #15803d; --warn: #a15c07; --bad: #b91c1c;
  --s0: #2563eb; --s1: #d97706; --s2: #0d9488; --s3: #a21caf;
  --s4: #dc2626; --s5: #64748b; --s6: #4d7c0f; --s7: #7c3aed;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #10151c; --card: #19212b; --text: #e5eaf0; --soft: #93a1b3; --line: #2c3744;
    --good: #4ade80; --warn: #fbbf24; --bad: #f87171;
    --s0: #60a5fa; --s1: #fbbf24; --s2: #2dd4bf; --s3: #e879f9;
    --s4: #f87171; --s5: #94a3b8; --s6: #a3e635; --s7: #a78bfa;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 24px 16px 48px; }
h1 { font-size: 24px; font-weight: 500; margin: 0 0 4px; }
h2 { font-size: 16px; margin: 0 0 12px; }
header p { color: var(--soft); margin: 0 0 12px; }
.mark { display: inline-block; border: 1px solid currentColor; border-radius: 99px; padding: 2px 12px;
  margin: 0 8px 8px 0; font-size: 13px; font-weight: 600; }
.good { color: var(--good); } .warn { color: var(--warn); } .bad { color: var(--bad); }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 16px; margin-top: 16px; }
section p { margin: 12px 0 0; color: var(--soft); }
section p:first-of-type:not(:last-child) { margin-top: 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 16px; }
.tiles span { display: block; color: var(--soft); font-size: 13px; }
.tiles b { font-size: 24px; font-weight: 600; font-variant-numeric: tabular-nums; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); gap: 24px; }
figure { margin: 0; min-width: 0; }
figcaption { font-weight: 600; display: flex; flex-wrap: wrap; justify-content: space-between; gap: 4px 16px; }
.legend { font-weight: 400; font-size: 13px; color: var(--soft); display: flex; flex-wrap: wrap; gap: 0 12px; }
.swatch { display: inline-block; width: 12px; height: 3px; border-radius: 2px;
  vertical-align: middle; margin-right: 5px; }
svg { width: 100%; height: auto; display: block; }
svg text { font-size: 11px; fill: var(--soft); }
svg .y { text-anchor: end; } svg .x { text-anchor: middle; } svg .empty { text-anchor: middle; font-size: 14px; }
svg .band { fill: var(--bad); opacity: 0.13; }
svg .grid { stroke: var(--line); stroke-width: 1; }
polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
.table { overflow-x: auto; } .table + .table { margin-top: 16px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { text-align: right; padding: 5px 10px; border-bottom: 1px solid var(--line); }
th, td:not(:last-child) { white-space: nowrap; } td:last-child { min-width: 7em; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th { color: var(--soft); font-weight: 500; }
tbody tr:last-child td { border-bottom: 0; }
""" + "\n".join(
    f"polyline.s{n} {{ stroke: var(--s{n}); }} .swatch.s{n} {{ background: var(--s{n}); }} "
    f"circle.s{n}, rect.s{n} {{ fill: var(--s{n}); }}"
    for n in range(8)
)
