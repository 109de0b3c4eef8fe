"""The look of ``report.html``: light, dark and printed."""

from __future__ import annotations

#: Colours by use; each text colour is read on ``back``, ``card`` and ``chosen`` with a contrast of at least 4.5.
LIGHT = {
    "back": "#ffffff", "card": "#f4f6f8", "chosen": "#e2f3ea", "text": "#1b1f24", "soft": "#535c67", "line": "#cdd4dc",
    "good": "#0b6848", "warn": "#834700", "bad": "#ab2219", "mark": "#5b6673",
}  # fmt: skip
DARK = {
    "back": "#14171b", "card": "#1d2228", "chosen": "#17382a", "text": "#e7eaee", "soft": "#a9b3be", "line": "#3b444f",
    "good": "#63d6a3", "warn": "#ffb95e", "bad": "#ff958b", "mark": "#93a0ae",
}  # fmt: skip


def _variables(colours: dict[str, str]) -> str:
    return "".join(f"--{name}:{colour};" for name, colour in colours.items())


STYLE = f"""
:root{{color-scheme:light dark;{_variables(LIGHT)}}}
@media screen and (prefers-color-scheme:dark){{
:root{{{_variables(DARK)}}}
}}
*{{box-sizing:border-box}}
body{{font:15px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif;max-width:68rem;margin:0 auto;
  padding:2rem 1.25rem;color:var(--text);background:var(--back)}}
h1{{font-size:1.9rem;line-height:1.2;margin:0}}
h2{{margin:2.8rem 0 .6rem;padding-top:.6rem;border-top:1px solid var(--line)}}
h3{{margin:1.6rem 0 .4rem}}
p{{max-width:48rem;margin:.5rem 0}}
code{{font:.92em/1.4 ui-monospace,Consolas,monospace}}
.soft,figcaption,caption,.none{{color:var(--soft)}}
.none{{font-size:.9em;font-style:italic}}
.good{{color:var(--good)}}
.warn{{color:var(--warn)}}
.bad{{color:var(--bad)}}
.notice{{border-left:4px solid currentColor;background:var(--card);padding:.5rem .9rem;margin:.8rem 0;
  max-width:none;overflow-wrap:anywhere}}
.notice b,.notice span{{color:var(--text)}}
.verdict{{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:1rem 1.2rem;margin:1rem 0}}
.verdict h3{{margin:0 0 .3rem}}
.tiles{{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.7rem;margin:.8rem 0 .4rem;
  padding:0}}
.tiles div{{border-left:3px solid var(--line);padding-left:.7rem}}
.tiles dt{{color:var(--soft);font-size:.86rem}}
.tiles dd{{margin:0}}
.tiles dd b{{display:block;font-size:1.35rem;line-height:1.3}}
.tiles small{{color:var(--soft)}}
.wide{{overflow-x:auto;margin:.6rem 0 1rem}}
table{{border-collapse:collapse;font-size:.92rem;font-variant-numeric:tabular-nums}}
caption{{text-align:left;padding:.2rem 0;font-size:.9rem;min-width:22rem}}
th,td{{padding:.32rem .6rem;text-align:right;vertical-align:top;border-bottom:1px solid var(--line);
  white-space:nowrap}}
thead th{{font-weight:600;vertical-align:bottom}}
tbody th{{font-weight:400}}
.text,tbody th{{text-align:left}}
td.words{{white-space:normal;text-align:left;min-width:15rem;max-width:26rem}}
td.name,th.name{{white-space:normal;min-width:7rem;text-align:left;overflow-wrap:anywhere}}
tr.chosen,tbody.chosen{{background:var(--chosen)}}
tr.chosen th,tbody.chosen th{{font-weight:600}}
table.pairs tr:first-child td,table.pairs tr:first-child th{{border-bottom:0}}
table.pairs tr+tr td{{padding-top:0}}
table.pairs td.words{{max-width:none}}
table.pairs thead th{{border-bottom:1px solid var(--line)!important}}
table.facts th{{font-weight:400;color:var(--soft);vertical-align:top}}
table.facts td{{white-space:normal;text-align:left;overflow-wrap:anywhere}}
table.confusion td{{text-align:center;min-width:2.1rem;padding:.2rem .3rem}}
table.confusion thead th{{text-align:center}}
table.confusion.many{{font-size:.78rem}}
table.confusion.many thead th{{writing-mode:vertical-rl;transform:rotate(180deg)}}
.hit{{background:rgba(11,120,84,var(--a))}}
.miss{{background:rgba(190,50,40,var(--a))}}
.bar{{display:inline-block;height:.7em;background:var(--mark);border-radius:2px;vertical-align:baseline}}
.bar.now{{background:var(--good)}}
details{{margin:.6rem 0}}
summary{{cursor:pointer;padding:.2rem 0;color:var(--text)}}
.plots{{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(26rem,100%),1fr));gap:1rem}}
figure{{margin:.6rem 0}}
figcaption{{font-size:.88rem}}
svg{{width:100%;height:auto;display:block;font:12px system-ui,sans-serif}}
svg text{{fill:var(--text);paint-order:stroke;stroke:var(--back);stroke-width:3px;stroke-linejoin:round}}
svg .number{{stroke:none}}
svg .soft{{fill:var(--soft)}}
svg .axis{{stroke:var(--mark);fill:none}}
svg .grid{{stroke:var(--line);fill:none}}
svg .limit{{stroke:var(--warn);stroke-dasharray:5 4;fill:none}}
svg .limit-text{{fill:var(--warn)}}
svg .front{{stroke:var(--good);stroke-width:1.6;fill:none}}
svg .kept{{fill:var(--mark);stroke:var(--mark)}}
svg .chosen{{fill:var(--good);stroke:var(--good)}}
svg .missed{{fill:var(--back);stroke:var(--bad);stroke-width:1.6}}
svg .span{{stroke:var(--mark);stroke-width:1.2;fill:none}}
svg .ring{{fill:none;stroke:var(--good);stroke-width:1.6}}
svg .number{{fill:var(--back);font-size:11px;font-weight:600}}
svg .number.on-missed{{fill:var(--bad)}}
svg .curve{{stroke:var(--good);stroke-width:2;fill:none}}
svg .dot{{fill:var(--good)}}
svg .strong{{font-weight:600}}
pre{{background:var(--card);border:1px solid var(--line);border-radius:6px;padding:.7rem;overflow-x:auto;
  white-space:pre-wrap}}
footer{{margin-top:3rem;color:var(--soft);font-size:.88rem}}
a{{color:inherit}}
:focus-visible{{outline:2px solid var(--good);outline-offset:2px}}
@media print{{
body{{max-width:none;padding:0;font-size:10.5pt}}
table{{font-size:8.5pt}}
th,td{{padding:.18rem .4rem}}
.wide{{overflow:visible}}
.plots{{grid-template-columns:1fr 1fr}}
td.words{{min-width:9rem}}
figure,.verdict,tr{{break-inside:avoid}}
h2,h3{{break-after:avoid}}
details::details-content{{content-visibility:visible;display:block;height:auto}}
summary{{list-style:none}}
*{{-webkit-print-color-adjust:exact;print-color-adjust:exact}}
}}
"""
