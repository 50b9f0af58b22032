// What the zoo costs as a whole, and what each model and tenant costs alone and in company.

const COST_ROWS = 50;

function totalsSection(facts) {
  const totals = facts.totals;
  const most = Math.max(totals.alone_bytes, totals.resident_bytes, totals.stored_bytes, 1);
  const bar = (label, bytes, tone, note) =>
    element(
      'div',
      { class: 'total' },
      element('span', {}, label),
      element('span', { class: `measure ${tone}`, '--width': `${(bytes / most) * 100}%` }),
      element('b', {}, bytesText(bytes)),
      element('span', { class: 'quiet' }, note)
    );
  const less = (bytes) => (totals.alone_bytes > bytes ? `${shareText(1 - bytes / totals.alone_bytes)} less` : '');
  const other = totals.other_stored_bytes > 0 ? `; ${bytesText(totals.other_stored_bytes)} more belong to no model now` : '';
  return element(
    'section',
    { 'aria-labelledby': 'totals-title' },
    element('h2', { id: 'totals-title' }, 'The whole'),
    element(
      'p',
      { class: 'quiet' },
      `${countText(totals.model_count, 'model')} of ${countText(totals.tenant_count, 'tenant')} are made of ${countText(totals.placed_count, 'block')}, of which ${totals.block_count.toLocaleString('en')} are distinct` +
        (totals.adapter_count ? `, and ${countText(totals.adapter_count, 'distinct adapter')}.` : '.')
    ),
    bar('each alone, in memory', totals.alone_bytes, 'plain', ''),
    bar('together, in memory', totals.resident_bytes, 'shared', less(totals.resident_bytes)),
    bar('together, on disk', totals.stored_bytes, 'shared', less(totals.stored_bytes) + other)
  );
}

function brokenSection(facts) {
  if (facts.broken.length === 0) return null;
  const lines = facts.broken.slice(0, 100).map((broken) => element('li', {}, element('b', {}, broken.model), ` ${broken.error}`));
  return element(
    'section',
    { class: 'broken', 'aria-labelledby': 'broken-title' },
    element('h2', { id: 'broken-title' }, `${countText(facts.broken.length, 'model')} cannot be read`),
    element('ul', {}, lines, facts.broken.length > 100 && element('li', {}, `and ${facts.broken.length - 100} more`))
  );
}

const COST_COLUMNS = [
  { text: 'Model', value: (one) => one.model || one.tenant, isName: true },
  { text: 'Alone', value: (one) => one.memory.alone_bytes, hint: 'memory that it would take by itself' },
  { text: 'Fair share', value: (one) => one.memory.fair_bytes, hint: 'memory of each part, divided by the models that have it' },
  { text: 'Own', value: (one) => one.memory.own_bytes, hint: 'memory of what no other has: what goes when it goes' },
  { text: 'Disk, fair', value: (one) => one.disk.fair_bytes, hint: 'files of its tensors, each divided by the models that have it' },
  { text: 'Disk, own', value: (one) => one.disk.own_bytes, hint: 'files of tensors that no other has' },
];

function costsSection(facts) {
  return element(
    'section',
    { 'aria-labelledby': 'costs-title' },
    element('h2', { id: 'costs-title' }, 'Costs'),
    element(
      'p',
      { class: 'quiet' },
      'In memory a block or adapter is there once for all who have it, so that a model costs its own blocks and a fair share of the others. On disk it is tensors that are there once.'
    ),
    element(
      'ul',
      { class: 'legend', 'aria-label': 'Legend' },
      element('li', {}, element('i', { class: 'cell own plain' }), 'its own'),
      element('li', {}, element('i', { class: 'cell shared hue-0', '--depth': '100%' }), 'share of what it shares'),
      element('li', {}, element('i', { class: 'cell spared' }), 'spared by sharing')
    ),
    costTable(facts.models, 'Costs of models'),
    facts.tenants.length > 1 && element('h3', {}, 'Tenants'),
    facts.tenants.length > 1 && costTable(facts.tenants, 'Costs of tenants')
  );
}

// A table that its column heads sort.
function costTable(items, title) {
  const most = items.reduce((most, one) => Math.max(most, one.memory.alone_bytes), 1);
  let sorted = { column: 0, isDown: false };
  const heads = COST_COLUMNS.map((column, index) => {
    const text = column.isName && items[0] && 'tenant' in items[0] ? 'Tenant' : column.text;
    const button = element('button', { type: 'button', title: column.hint, onclick: () => sortBy(index) }, text);
    return element('th', { scope: 'col', class: column.isName ? '' : 'figure' }, button);
  });
  const pages = paged(COST_ROWS, (part) =>
    element(
      'div',
      { class: 'scroll' },
      element(
        'table',
        { class: 'costs', 'aria-label': title },
        element('thead', {}, element('tr', {}, heads, element('th', { scope: 'col' }, 'Memory'))),
        element('tbody', {}, part.map((one) => costRow(one, most)))
      )
    )
  );
  function sortBy(index) {
    const column = COST_COLUMNS[index];
    sorted = { column: index, isDown: sorted.column === index ? !sorted.isDown : !column.isName };
    const by = (a, b) => (column.isName ? column.value(a).localeCompare(column.value(b)) : column.value(a) - column.value(b));
    heads.forEach((head, at) => {
      if (at === index) head.setAttribute('aria-sort', sorted.isDown ? 'descending' : 'ascending');
      else head.removeAttribute('aria-sort');
    });
    pages.show([...items].sort((a, b) => (sorted.isDown ? by(b, a) : by(a, b))));
  }
  sorted.isDown = true;
  sortBy(0);
  return pages.node;
}

function costRow(one, most) {
  const { alone_bytes: alone, fair_bytes: fair, own_bytes: own } = one.memory;
  const width = (bytes) => `${(bytes / most) * 100}%`;
  const label = `${bytesText(own)} its own, ${bytesText(fair)} fair share, ${bytesText(alone)} alone`;
  const bar = element(
    'span',
    { class: 'bar', role: 'img', 'aria-label': label, title: label, '--alone': width(alone) },
    element('span', { class: 'own', '--width': width(Math.min(own, fair)) }),
    element('span', { class: 'shared', '--width': width(Math.max(0, fair - own)) })
  );
  const [name, ...figures] = COST_COLUMNS;
  const about = [one.architecture, one.source && `from ${one.source}`, one.parent && `tuned from ${one.parent}`, one.licence].filter(Boolean).join(', ');
  const count = one.model_count && element('span', { class: 'quiet' }, ` ${countText(one.model_count, 'model')}`);
  return element(
    'tr',
    {},
    element('th', { scope: 'row' }, name.value(one), count, about && element('small', {}, about)),
    figures.map((column) => element('td', { class: 'figure' }, bytesText(column.value(one)))),
    element('td', { class: 'wide' }, bar)
  );
}
