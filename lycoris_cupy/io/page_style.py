"""The look of an inspection's page, and the few lines that sort and filter its table."""

STYLE = """
:root{color-scheme:light dark;--ground:#fbfbfa;--card:#fff;--text:#1d1f23;--soft:#62666d;
--edge:#e3e4e6;--blue:#2a6fdb;--band:#2a6fdb2e;--warn:#c2500a;--good:#20744a}
@media(prefers-color-scheme:dark){:root{--ground:#15171a;--card:#1d2024;--text:#e8e9eb;
--soft:#9da2aa;--edge:#32363c;--blue:#74a9ff;--band:#74a9ff33;--warn:#ff9c5a;--good:#6fcf97}}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--text);font:15px/1.5 system-ui,sans-serif}
main{max-width:1180px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:26px;margin:0;overflow-wrap:anywhere}h2{font-size:18px;margin:34px 0 2px}
.sub{color:var(--soft);margin:2px 0 10px;overflow-wrap:anywhere}
.tiles{display:flex;flex-wrap:wrap;gap:10px;margin:16px 0}
.tile{background:var(--card);border:1px solid var(--edge);border-radius:8px;padding:8px 14px}
.tile span{display:block;color:var(--soft);font-size:12px}.tile b{font-weight:600}
.good{color:var(--good)}.bad{border-left:3px solid var(--warn);padding:2px 0 2px 14px}
.bad summary{color:var(--warn);cursor:pointer;font-weight:600}.bad ul{padding-left:18px}
code{font:13px ui-monospace,monospace;overflow-wrap:anywhere}
svg{display:block;width:100%;height:auto}svg.spark{width:96px;height:20px}
.bar{fill:var(--blue)}.bar.mark,.key.mark{fill:var(--warn);background:var(--warn)}
.bar:hover{fill:var(--text)}.key{display:inline-block;width:11px;height:11px;border-radius:2px}
.grid{stroke:var(--edge);stroke-width:1}.tick,.label{fill:var(--soft);font-size:12px}
.tick{text-anchor:end}.label{text-anchor:middle}
.line{fill:none;stroke:var(--blue);stroke-width:1.8}.band{fill:var(--band)}.dot{fill:var(--blue)}
circle.line{fill:var(--blue);stroke:none}
.scroll{overflow-x:auto;border:1px solid var(--edge);border-radius:8px;background:var(--card)}
table{border-collapse:collapse;width:100%}.plain{background:var(--card)}
td,th{padding:5px 10px;text-align:left;border-bottom:1px solid var(--edge);vertical-align:middle}
th{position:sticky;top:0;background:var(--card);cursor:pointer;font-size:13px;white-space:nowrap}
th[aria-sort=ascending]::after{content:" \\2191"}th[aria-sort=descending]::after{content:" \\2193"}
td:first-child{min-width:340px}td small{display:block;color:var(--soft);font-size:12px}
.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.meter{min-width:110px;background:linear-gradient(90deg,var(--band) var(--share),transparent 0)}
tr.odd td:last-child{color:var(--warn)}
input{background:var(--card);color:inherit;border:1px solid var(--edge);border-radius:6px;
padding:3px 8px;font:inherit}
"""

SCRIPT = """
const table=document.getElementById("layers");
if(table){
  const body=table.tBodies[0],heads=[...table.tHead.rows[0].cells];
  const value=(row,i)=>row.cells[i].dataset.v??row.cells[i].textContent;
  const sort=(head,i)=>{
    const up=head.getAttribute("aria-sort")==="descending";
    heads.forEach(h=>h.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort",up?"ascending":"descending");
    const compare=(a,b)=>String(value(a,i)).localeCompare(value(b,i),undefined,{numeric:true});
    const numbers=(a,b)=>value(a,i)-value(b,i);
    const by="v" in body.rows[0].cells[i].dataset?numbers:compare;
    [...body.rows].sort((a,b)=>up?by(a,b):by(b,a)).forEach(row=>body.append(row));
  };
  heads.forEach((head,i)=>{
    head.onclick=()=>sort(head,i);
    head.onkeydown=event=>{if(event.key==="Enter")sort(head,i)};
  });
  document.getElementById("find").oninput=event=>{
    const text=event.target.value.toLowerCase();
    for(const row of body.rows)
      row.hidden=!(row.textContent+row.cells[0].title).toLowerCase().includes(text);
  };
}
"""
