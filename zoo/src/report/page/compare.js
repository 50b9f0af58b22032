// How alike two models are: a heat map of layers and roles, by one of three measures.

// `heat` is 0 where two tensors are equal and 1 where they are as unlike as the scale shows.
const MEASURES = [
  {
    text: 'difference',
    hint: 'root mean square of the difference, over that of the first',
    ends: ['0.1%', '141% and more'],
    value: (one) => one.relative_rms,
    heat: (value) => Math.log(Math.max(value, 1e-3) / 1e-3) / Math.log(Math.SQRT2 / 1e-3),
    show: (value) => shareText(value),
  },
  {
    text: 'equal elements',
    hint: 'share of the elements that are equal',
    ends: ['all', 'none'],
    value: (one) => one.equal_share,
    heat: (value) => 1 - value,
    show: (value) => shareText(value),
  },
  {
    text: 'cosine',
    hint: 'of the angle between the two',
    ends: ['1', '0 and less'],
    value: (one) => one.cosine,
    heat: (value) => 1 + Math.log10(Math.max(1 - value, 1e-6)) / 6,
    show: (value) => value.toFixed(value > 0.995 && value < 1 ? 5 : 2),
  },
];

function compareSection(facts) {
  const comparison = facts.comparison;
  if (!comparison) return null;
  const [a, b] = comparison.models;
  const box = element('div', { class: 'heats' });
  const scale = element('p', { class: 'scale' });
  const radios = MEASURES.map((measure, index) =>
    element(
      'label',
      { title: measure.hint },
      element('input', { type: 'radio', name: 'measure', checked: index === 0, onchange: () => draw(measure) }),
      ` ${measure.text}`
    )
  );
  function draw(measure) {
    box.replaceChildren(...heatTables(comparison, measure));
    scale.replaceChildren(
      element('span', {}, element('i', { class: 'heat same' }), 'the same tensor'),
      element('span', {}, measure.ends[0], element('i', { class: 'ramp' }), measure.ends[1]),
      element('span', {}, element('i', { class: 'heat apart' }), 'nothing to compare')
    );
  }
  draw(MEASURES[0]);
  const adapted = comparison.places.some((place) => place.adapted[0] || place.adapted[1]);
  return element(
    'section',
    { 'aria-labelledby': 'compare-title', class: 'compare' },
    element('h2', { id: 'compare-title' }, `${a} and ${b}`),
    element('p', { class: 'quiet' }, `How the weights of ${b} differ from those of ${a}, tensor by tensor.${adapted ? ' Adapters are not part of it.' : ''}`),
    element('div', { class: 'tools' }, element('fieldset', {}, element('legend', {}, 'Measure'), radios), scale),
    box
  );
}

// Tables of the layers, and of the two ends.
function heatTables(comparison, measure) {
  const kinds = comparison.places.map((place) => place.kinds[0] || place.kinds[1]);
  const numbers = layersOf(kinds);
  const places = comparison.places.map((place, index) => ({ ...place, layer: numbers[index], kind: kinds[index] }));
  const layers = [];
  for (const place of places.filter((one) => isOfLayer(one.kind))) {
    const layer = place.layer;
    layers[layer] = layers[layer] || { name: `layer ${layer}`, cells: new Map() };
    for (const [role, tensor] of Object.entries(place.tensors)) layers[layer].cells.set(`${place.kind} ${role}`, { place, role, tensor });
  }
  const ends = places.filter((one) => !isOfLayer(one.kind)).map((place) => ({
    name: place.kind,
    cells: new Map(Object.entries(place.tensors).map(([role, tensor]) => [`${place.kind} ${role}`, { place, role, tensor }])),
  }));
  return [heatTable(layers.filter(Boolean), ['attention', 'feed_forward'], measure), heatTable(ends, ['embed', 'stitch', 'head'], measure)];
}

function heatTable(rows, kinds, measure) {
  const keys = kinds.flatMap((kind) => [...new Set(rows.flatMap((row) => [...row.cells.keys()]))].filter((key) => key.startsWith(`${kind} `)).sort(byMatrix));
  const groups = kinds.map((kind) => {
    const count = keys.filter((key) => key.startsWith(`${kind} `)).length;
    return count > 0 && element('th', { scope: 'colgroup', colspan: count, class: 'first' }, KIND_TEXT[kind]);
  });
  const isFirst = (index) => index === 0 || keys[index - 1].split(' ')[0] !== keys[index].split(' ')[0];
  const heads = keys.map((key, index) => element('th', { scope: 'col', class: isFirst(index) ? 'first' : '' }, roleText(key.split(' ')[1])));
  const grid = [];
  const lines = rows.map((row) => {
    const cells = keys.map((key, index) => heatCell(row.cells.get(key), measure, isFirst(index)));
    grid.push(cells.filter((cell) => cell.tabIndex === -1 && cell.className.includes('heat')));
    return element('tr', {}, element('th', { scope: 'row' }, row.name), cells);
  });
  const table = element(
    'table',
    { class: 'heatmap', role: 'grid', 'aria-label': measure.text },
    element('thead', {}, element('tr', {}, element('td'), groups), element('tr', {}, element('td'), heads)),
    element('tbody', {}, lines)
  );
  arrowKeys(table, grid.filter((row) => row.length > 0));
  return element('div', { class: 'scroll' }, table);
}

const ROLES = ['q', 'k', 'v', 'o', 'gate', 'up', 'down'];

// Matrices in the order in which a block uses them, then norms and biases by name.
function byMatrix(a, b) {
  const rank = (key) => (ROLES.indexOf(roleText(key.split(' ')[1])) + 1 || 100) + (/norm|bias/.test(key) ? 1 : 0);
  return rank(a) - rank(b) || a.localeCompare(b);
}

function heatCell(found, measure, isFirst) {
  if (!found) return element('td', { class: isFirst ? 'first' : '' });
  const { place, role, tensor } = found;
  const where = `${placeText(place.kind, place.layer)} ${roleText(role)}`;
  const value = tensor.state === 'compared' ? measure.value(tensor) : null;
  const heat = value == null ? 0 : Math.max(0, Math.min(measure.heat(value), 1));
  const text = { same: '=', apart: '–', compared: value == null ? '–' : measure.show(value) }[tensor.state];
  const state = tensor.state === 'compared' && value == null ? 'apart' : tensor.state;
  const cell = element(
    'td',
    {
      role: 'gridcell',
      tabindex: -1,
      class: `heat ${state} ${heat > 0.55 ? 'hot' : ''} ${isFirst ? 'first' : ''}`,
      '--heat': `${(heat * 100).toFixed(1)}%`,
      'aria-label': `${where}: ${({ same: 'the same tensor', apart: 'nothing to compare', compared: text })[state]}`,
    },
    text
  );
  const tell = () => tellTensor(where, tensor);
  onPoint(cell, tell);
  cell.addEventListener('focus', tell);
  return cell;
}

function tellTensor(where, tensor) {
  if (tensor.state === 'same') return showDetails(where, ['the two', `are the same tensor of ${bytesText(tensor.bytes)}`]);
  if (tensor.state === 'apart') return showDetails(where, ['the two', 'are of different shapes, or only one model has it']);
  const or = (value, show) => (value == null ? 'not defined' : show(value));
  return showDetails(
    where,
    ['difference', or(tensor.relative_rms, (value) => `${(value * 100).toPrecision(3)}%`)],
    ['equal elements', `${shareText(tensor.equal_share)} of ${tensor.count.toLocaleString('en')}`],
    ['cosine', or(tensor.cosine, (value) => value.toFixed(6))]
  );
}
