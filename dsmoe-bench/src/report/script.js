document.querySelectorAll('table.sortable thead button').forEach(function(button){
  button.addEventListener('click',function(){
    var th=button.parentNode,table=th.closest('table'),body=table.tBodies[0],at=th.cellIndex;
    var down=th.getAttribute('aria-sort')==='ascending';
    table.querySelectorAll('thead th').forEach(function(other){other.removeAttribute('aria-sort')});
    th.setAttribute('aria-sort',down?'descending':'ascending');
    function key(row){var c=row.cells[at],v=c.getAttribute('data-v');return v===null?c.textContent.trim():parseFloat(v)}
    Array.from(body.rows).sort(function(a,b){
      var x=key(a),y=key(b),n=typeof x==='number',m=typeof y==='number';
      var order=n&&m?x-y:n?-1:m?1:x.localeCompare(y);
      return down&&n===m?-order:order;
    }).forEach(function(row){body.appendChild(row)});
  });
});
document.querySelectorAll('.choice').forEach(function(choice){
  function pick(){
    var id=choice.querySelector('input:checked').value;
    choice.querySelectorAll('figure').forEach(function(figure){figure.hidden=figure.id!==id});
  }
  choice.addEventListener('change',pick);pick();
});
var tip=document.getElementById('tip');
function show(target,x,y){
  tip.textContent=target.getAttribute('data-tip');tip.style.display='block';
  tip.style.left=Math.max(4,Math.min(x+12,innerWidth-tip.offsetWidth-8))+'px';
  tip.style.top=(y+tip.offsetHeight+24>innerHeight?y-tip.offsetHeight-10:y+16)+'px';
}
document.addEventListener('pointermove',function(event){
  var target=event.target.closest&&event.target.closest('[data-tip]');
  if(target)show(target,event.clientX,event.clientY);else tip.style.display='none';
});
document.addEventListener('focusin',function(event){
  if(event.target.hasAttribute('data-tip')){var box=event.target.getBoundingClientRect();show(event.target,box.right,box.bottom)}
});
document.addEventListener('focusout',function(){tip.style.display='none'});
// The tip follows its mark where the page scrolls, and goes with it.
document.addEventListener('scroll',function(){
  var mark=document.activeElement,box=mark&&mark.hasAttribute('data-tip')&&mark.getBoundingClientRect();
  if(box&&box.top<innerHeight&&box.bottom>0)show(mark,box.right,box.bottom);else tip.style.display='none';
},true);
document.getElementById('theme').addEventListener('click',function(){
  var root=document.documentElement,now=root.getAttribute('data-theme')||(matchMedia('(prefers-color-scheme:dark)').matches?'dark':'light');
  root.setAttribute('data-theme',now==='dark'?'light':'dark');
});
