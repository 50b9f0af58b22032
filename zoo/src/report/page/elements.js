'use strict';
// Elements out of text, and numbers as people read them. Text goes in as text nodes alone, never as markup.

function element(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith('--')) made.style.setProperty(name, value);
    else if (name.startsWith('on')) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, '');
    else if (value !== false && value != null) made.setAttribute(name, value);
  }
  made.append(...children.flat().filter((child) => child != null && child !== false));
  return made;
}

function bytesText(bytes) {
  let value = bytes;
  let unit = 'B';
  for (const next of ['kB', 'MB', 'GB', 'TB', 'PB']) {
    if (value < 999.5) break;
    value /= 1000;
    unit = next;
  }
  return unit === 'B' ? `${bytes} B` : `${value < 9.95 ? value.toFixed(1) : value.toFixed(0)} ${unit}`;
}

function countText(count, one, several) {
  return count === 1 ? `1 ${one}` : `${count.toLocaleString('en')} ${several || `${one}s`}`;
}

// A share of 0 to 1; what is nearly nothing or nearly all is not rounded to it.
function shareText(share) {
  if (share > 0 && share < 0.001) return '<0.1%';
  if (share < 1 && share > 0.999) return '>99.9%';
  return `${(share * 100).toFixed(share > 0 && share < 0.1 ? 1 : 0)}%`;
}

const KIND_TEXT = { embed: 'embed', attention: 'attention', feed_forward: 'feed-forward', head: 'head', stitch: 'stitch' };

// Whether a block of a kind is one of a layer's two.
function isOfLayer(kind) {
  return kind === 'attention' || kind === 'feed_forward';
}

// The layer's number at each place of a chain whose blocks are of these kinds: each begins with its attention.
function layersOf(kinds) {
  let layer = -1;
  return kinds.map((kind) => (kind === 'attention' ? (layer += 1) : layer));
}

// The kind of a block, with its layer's number.
function placeText(kind, layer) {
  return isOfLayer(kind) ? `${KIND_TEXT[kind]} ${layer}` : KIND_TEXT[kind];
}

// Shows names, the first few only.
function namesText(names, most) {
  return names.length <= most ? names.join(', ') : `${names.slice(0, most).join(', ')} and ${names.length - most} more`;
}

// Lists `items` a page at a time: `draw(part)` returns an element for a part of them. Returns { node, show(items) }.
function paged(size, draw) {
  const body = element('div');
  const said = element('span', { class: 'quiet', 'aria-live': 'polite' });
  const earlier = element('button', { type: 'button', onclick: () => turn(-1) }, 'Earlier');
  const later = element('button', { type: 'button', onclick: () => turn(1) }, 'Later');
  const bar = element('nav', { class: 'pages', 'aria-label': 'Pages' }, earlier, later, said);
  let items = [];
  let from = 0;
  function turn(by) {
    from += by * size;
    redraw();
  }
  function redraw() {
    body.replaceChildren(draw(items.slice(from, from + size)));
    bar.hidden = items.length <= size;
    earlier.disabled = from === 0;
    later.disabled = from + size >= items.length;
    said.textContent = `${from + 1} to ${Math.min(from + size, items.length)} of ${items.length}`;
  }
  return {
    node: element('div', {}, body, bar),
    show(shown) {
      items = shown;
      from = 0;
      redraw();
    },
  };
}

// What the pointer or the keyboard is at.
function showDetails(title, ...facts) {
  const list = facts.filter(Boolean).map(([term, value]) => element('div', {}, element('dt', {}, term), element('dd', {}, value)));
  document.getElementById('details').replaceChildren(element('strong', {}, title), element('dl', {}, list));
}

// Calls `tell` with events of a pointer that moves onto something in `node`; not where the page scrolls under one that rests, as the keyboard makes it do.
const pointer = { x: NaN, y: NaN };
function onPoint(node, tell) {
  node.addEventListener('pointerover', (event) => {
    const rests = event.clientX === pointer.x && event.clientY === pointer.y;
    Object.assign(pointer, { x: event.clientX, y: event.clientY });
    if (!rests) tell(event);
  });
}

// One cell of `rows` is in the order of tabs, the one that had the focus last; arrows, Home and End go on from it.
function arrowKeys(table, rows) {
  const places = new Map();
  rows.forEach((row, y) => row.forEach((cell, x) => places.set(cell, [x, y])));
  let stop = rows[0] && rows[0][0];
  if (stop) stop.tabIndex = 0;
  table.addEventListener('focusin', (event) => {
    if (!places.has(event.target)) return;
    stop.tabIndex = -1;
    stop = event.target;
    stop.tabIndex = 0;
  });
  table.addEventListener('keydown', (event) => {
    const at = places.get(event.target);
    if (!at || event.ctrlKey || event.metaKey || event.altKey) return;
    let [x, y] = at;
    if (event.key === 'ArrowRight') x += 1;
    else if (event.key === 'ArrowLeft') x -= 1;
    else if (event.key === 'ArrowDown') y += 1;
    else if (event.key === 'ArrowUp') y -= 1;
    else if (event.key === 'Home') x = 0;
    else if (event.key === 'End') x = Infinity;
    else return;
    event.preventDefault();
    const row = rows[Math.max(0, Math.min(y, rows.length - 1))];
    row[Math.max(0, Math.min(x, row.length - 1))].focus();
  });
}
