// The map: a row for each chain, a cell for each block. Equal blocks of neighbouring rows are drawn as one stone.

const MAP_ROWS = 50;
const HUES = 5;

function mapSection(facts) {
  const rows = mapRows(facts);
  const cellsOf = new Map();
  const pages = paged(MAP_ROWS, (part) => {
    cellsOf.clear();
    const longestName = part.reduce((most, row) => Math.max(most, row.names[0].length), 0);
    const box = element('div', { class: 'maps', '--name': longestName });
    for (const title of new Set(part.map((row) => row.title))) {
      const shown = part.filter((row) => row.title === title);
      box.append(element('h3', {}, title), element('div', { class: 'scroll' }, mapTable(facts, shown, title, cellsOf)));
    }
    if (part.length === 0) box.append(element('p', { class: 'quiet' }, 'No model has this in its name.'));
    lightSharers(box, facts, cellsOf);
    return box;
  });
  const find = element('input', { type: 'search', id: 'find', placeholder: 'tenant or model', autocomplete: 'off' });
  find.addEventListener('input', () => {
    const wanted = find.value.trim().toLowerCase();
    pages.show(rows.filter((row) => row.names.some((name) => name.toLowerCase().includes(wanted))));
  });
  pages.show(rows);
  return element(
    'section',
    { 'aria-labelledby': 'map-title' },
    element('h2', { id: 'map-title' }, 'Blocks'),
    element(
      'p',
      { class: 'quiet' },
      'A row is a chain of blocks, from the first to the last. Stones that reach over several rows are one block, stored once, resident once and computed together. Point at one, or go there with the arrow keys.'
    ),
    element('div', { class: 'tools' }, mapLegend(), element('label', { for: 'find' }, 'Find ', find)),
    pages.node,
    facts.rows_left_out > 0 &&
      element('p', { class: 'quiet' }, `${countText(facts.rows_left_out, 'row')} more would be too much for a page and left out; the costs below are whole.`)
  );
}

// Rows of all kin, those that share with nobody last and under one title.
function mapRows(facts) {
  const several = facts.kin.filter((kin) => kin.model_count > 1);
  const alone = facts.kin.filter((kin) => kin.model_count === 1);
  const named = (row, title, count) => ({ ...row, title, count, names: row.models.map((model) => facts.models[model].model) });
  const titles = new Map();
  const titleOf = (kin) => {
    const first = facts.models[kin.rows[0].models[0]];
    const title = `${countText(kin.model_count, 'model')} that share weights, ${first.architecture}`;
    titles.set(title, (titles.get(title) || 0) + 1);
    return titles.get(title) === 1 ? title : `${title} (${titles.get(title)})`;
  };
  const shared = several.flatMap((kin) => {
    const title = titleOf(kin);
    return kin.rows.map((row) => named(row, title, kin.model_count));
  });
  const title = alone.length === 1 ? '1 model that shares nothing' : `${alone.length} models that share nothing`;
  return shared.concat(alone.flatMap((kin) => kin.rows.map((row) => named(row, title, 1))));
}

function mapTable(facts, rows, title, cellsOf) {
  const longest = rows.reduce((most, row) => (row.blocks.length > most.blocks.length ? row : most));
  const heads = [element('th', { scope: 'col' }, 'Model')];
  const layersIn = (row) => layersOf(row.blocks.map((block) => facts.blocks[block].kind));
  const layers = layersIn(longest);
  for (let place = 0; place < longest.blocks.length; place += 1) {
    const kind = facts.blocks[longest.blocks[place]].kind;
    if (kind === 'feed_forward') continue;
    const isLayer = kind === 'attention';
    heads.push(element('th', { scope: 'col', colspan: isLayer ? 2 : 1, class: 'layer' }, isLayer ? String(layers[place]) : kind));
  }
  const body = element('tbody');
  const grid = rows.map((row, index) => {
    const layers = layersIn(row);
    const cells = row.blocks.map((_, place) => mapCell(facts, rows, index, place, layers[place]));
    cells.forEach((cell, place) => {
      const block = row.blocks[place];
      if (!cellsOf.has(block)) cellsOf.set(block, []);
      cellsOf.get(block).push(cell);
    });
    const first = row.names[0];
    const more = row.names.length > 1 && element('span', { class: 'quiet' }, ` and ${row.names.length - 1} more`);
    const source = facts.models[row.models[0]].source;
    const head = element('th', { scope: 'row', title: `${namesText(row.names, 20)}\nfrom ${source}` }, first, more);
    body.append(element('tr', {}, head, cells));
    return cells;
  });
  const table = element('table', { class: 'map', role: 'grid', 'aria-label': title, '--places': longest.blocks.length }, element('thead', {}, element('tr', {}, heads)), body);
  arrowKeys(table, grid);
  return table;
}

function mapCell(facts, rows, index, place, layer) {
  const row = rows[index];
  const number = row.blocks[place];
  const block = facts.blocks[number];
  const isShared = block.model_count > 1;
  const above = rows[index - 1] && rows[index - 1].blocks[place] === number;
  const below = rows[index + 1] && rows[index + 1].blocks[place] === number;
  const part = block.bytes > 0 ? block.common_bytes / block.bytes : 0;
  const adapter = place in row.adapters;
  const classes = ['cell', block.kind, isShared ? `shared hue-${row.ranks[place] % HUES}` : 'own', above && 'above', below && 'below', adapter && 'adapted'];
  const said = isShared ? `${block.model_count} models have it` : 'no other model has it';
  const cell = element('td', {
    role: 'gridcell',
    tabindex: -1,
    class: classes.filter(Boolean).join(' '),
    'aria-label': `${placeText(block.kind, layer)}: ${said}${adapter ? ', with an adapter over it' : ''}`,
    '--depth': isShared ? `${55 + 45 * Math.min(1, block.model_count / row.count)}%` : '100%',
    // What others have of a block of its own; a hair stays visible at either end.
    '--part': part === 0 ? '0%' : `${Math.max(8, Math.min(part * 100, 88))}%`,
  });
  const figure = String(block.model_count);
  const fits = figure.length <= 2 || !isOfLayer(block.kind);
  if (isShared && !above && fits) cell.append(element('span', { 'aria-hidden': 'true' }, figure));
  cell.facts = { number, row, place, layer };
  return cell;
}

// Pointing at a block, or going there with the keyboard, lights every place where it is.
function lightSharers(box, facts, cellsOf) {
  let lit = [];
  const dark = () => {
    lit.forEach((cell) => cell.classList.remove('lit'));
    lit = [];
    box.classList.remove('pointing');
  };
  const light = (event) => {
    const cell = event.target.closest('td.cell');
    dark();
    if (!cell) return;
    lit = cellsOf.get(cell.facts.number);
    lit.forEach((one) => one.classList.add('lit'));
    box.classList.add('pointing');
    tellBlock(facts, cell.facts);
  };
  onPoint(box, light);
  box.addEventListener('focusin', light);
  box.addEventListener('pointerleave', dark);
  box.addEventListener('focusout', dark);
}

function tellBlock(facts, { number, row, place, layer }) {
  const block = facts.blocks[number];
  const sharers = facts.kin.flatMap((kin) => kin.rows).filter((one) => one.blocks.includes(number));
  const names = sharers.flatMap((one) => one.models).sort((a, b) => a - b).map((model) => facts.models[model].model);
  const adapter = place in row.adapters && facts.adapters[row.adapters[place]];
  const others = block.model_count === 1 && block.common_bytes > 0;
  showDetails(
    placeText(block.kind, layer),
    ['in', namesText(row.names, 3)],
    ['size', `${bytesText(block.bytes)} ${block.dtypes.join(', ')}`],
    block.model_count > 1 ? ['shared by', `${countText(block.model_count, 'model')}: ${namesText(names, 12)}`] : ['shared by', 'nobody'],
    others && ['tensors of it that others have', `${shareText(block.common_bytes / block.bytes)} of its bytes`],
    adapter && ['adapter over it', `${adapter.roles.map(roleText).join(', ')}; ${bytesText(adapter.bytes)}, in ${countText(adapter.model_count, 'model')}`],
    ['digest', element('code', {}, block.digest)]
  );
}

function roleText(role) {
  return role.replace(/\.weight$/, '');
}

function mapLegend() {
  const sign = (classes, text) => element('li', {}, element('i', { class: `cell ${classes}`, '--depth': '100%', '--part': '65%' }), text);
  const hues = [0, 1, 2, 3].map((hue) => element('i', { class: `cell shared hue-${hue}`, '--depth': '100%' }));
  return element(
    'ul',
    { class: 'legend', 'aria-label': 'Legend' },
    element('li', {}, hues, 'shared; the figure counts its models'),
    sign('own plain', 'of one model alone'),
    sign('own', 'of one alone, but for some of its tensors'),
    sign('shared hue-0 adapted', 'with an adapter over it')
  );
}
