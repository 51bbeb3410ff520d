// Settings of the runs, what differs between them, and where everything came from.

function settings(section, report) {
  heading(section, 'Settings and provenance');
  section.append(el('div', { class: 'two' }, settingsTable(report), ...report.runs.map((run) => provenance(report, run))));
}

function settingsTable(report) {
  const keys = [...new Set(report.runs.flatMap((run) => Object.keys(run.settings)))].sort();
  const differs = (key) => new Set(report.runs.map((run) => JSON.stringify(run.settings[key]))).size > 1;
  const isSeveral = report.runs.length > 1;
  const body = el('tbody');
  const fill = (onlyDifferent) => body.replaceChildren(...keys.filter((key) => !onlyDifferent || differs(key)).map((key) => el('tr', null,
    el('td', { class: 'mono' }, key),
    report.runs.map((run) => el('td', { class: isSeveral && differs(key) ? 'mono differs' : 'mono' }, shownSetting(run.settings[key]))))));
  fill(isSeveral);
  const only = el('input', { type: 'checkbox', checked: isSeveral, onchange: () => fill(only.checked) });
  return el('details', { class: 'card', open: isSeveral },
    el('summary', null, el('b', null, 'Settings'), el('span', { class: 'quiet small' }, ` · ${keys.length} keys`)),
    isSeveral ? el('div', { class: 'tools' }, el('label', null, only, 'only what differs')) : null,
    el('div', { class: 'scroll' }, el('table', { class: 'left', id: 'settings-table' },
      isSeveral ? el('thead', null, el('tr', null, el('th', null, 'key'), report.runs.map((run) => el('th', null, runLabel(report, run))))) : null,
      body)));
}

function shownSetting(value) {
  if (value === undefined) return '';
  return value === null ? 'null' : String(value);
}

function provenance(report, run) {
  return el('details', { class: 'card' },
    el('summary', null, el('b', null, report.runs.length > 1 ? `Provenance of ${run.name}` : 'Provenance'),
      el('span', { class: 'quiet small' }, ' · hashes of what every stage consumed, versions')),
    el('div', { class: 'scroll' }, el('table', { class: 'left' }, el('tbody', null,
      el('tr', null, el('td', null, 'run directory'), el('td', null, ''), el('td', { class: 'mono' }, run.path)),
      run.provenance.map((row, index) => el('tr', null,
        el('td', null, row.where === run.provenance[index - 1]?.where ? '' : row.where),
        el('td', null, row.what), el('td', { class: 'mono' }, row.value)))))));
}
