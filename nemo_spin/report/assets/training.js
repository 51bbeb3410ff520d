// Curves of the training, distributions over pairs, and the checks of every iteration.

const CURVES = [
  { title: 'Loss', keys: ['loss'] },
  { title: 'Margin', keys: ['margin'], zero: true },
  {
    title: 'Log-probabilities', unit: 'nats per token',
    keys: ['policy_real_logps_per_token', 'policy_generated_logps_per_token'],
  },
  {
    title: 'Gain over the opponent', unit: 'nats per token', zero: true,
    about: 'Policy less opponent. If the real responses fall below 0, the policy is leaving the demonstrations.',
    keys: ['real_gain_per_token', 'generated_gain_per_token'],
  },
  {
    title: 'Rewards', zero: true, keys: ['real_rewards', 'generated_rewards'],
    about: 'Beta times the gain over the opponent, of whole responses. The margin is their difference.',
  },
  { title: 'Accuracy', keys: ['accuracy'], range: [0, 1], about: 'Share of pairs with a positive margin.' },
  { title: 'Gradient norm', keys: ['grad_norm'], mayBeLog: true, about: 'Before clipping.' },
  { title: 'Learning rate', keys: ['lr'] },
  {
    title: 'Speed', unit: 'needed tokens per second', keys: ['tokens_per_second'],
    about: 'Prompts once, and responses, over all the time between two steps: loading, saving and evaluating included.',
  },
];
const KNOWN = new Set([
  ...CURVES.flatMap((curve) => curve.keys), 'step', 'units', 'start_loss', 'real_tokens', 'generated_tokens', 'response_tokens',
  'pairs', 'policy_real_logps', 'policy_generated_logps', 'opponent_real_logps',
  'opponent_generated_logps', 'opponent_real_logps_per_token', 'opponent_generated_logps_per_token',
]);
const KINDS = ['real', 'generated'];

function training(section, report) {
  if (!report.runs.some((run) => run.parts.some((part) => part.curves.steps))) return;
  heading(section, 'Training', averagedLead(report));
  const state = { laidOver: false, smooth: true };
  const plots = el('div', { class: 'plots' });
  const more = el('div', { class: 'plots' });
  const extra = [...new Set(report.runs.flatMap((run) => run.parts.flatMap((part) => columnNames(part.curves.train))))]
    .filter((name) => !KNOWN.has(name)).sort().map((name) => ({ title: name, keys: [name] }));
  const draw = () => {
    plots.replaceChildren(...CURVES.map((curve) => curveCard(report, curve, state)).filter(Boolean));
    more.replaceChildren(...extra.map((curve) => curveCard(report, curve, state)).filter(Boolean));
  };
  const smooth = el('input', { type: 'checkbox', checked: true, onchange: () => { state.smooth = smooth.checked; draw(); } });
  section.append(
    el('div', { class: 'tools' },
      switcher([[false, 'iterations one after the other'], [true, 'laid over each other']], false, (value) => { state.laidOver = value; draw(); }),
      el('label', null, smooth, 'smoothed'),
      el('span', { class: 'quiet small' }, '○ held out')),
    plots);
  if (extra.length) section.append(el('details', { class: 'card', style: { 'margin-top': '.9rem' } }, el('summary', null, `${extra.length} more metrics`), more));
  draw();
}

function averagedLead(report) {
  const most = Math.max(...report.runs.flatMap((run) => run.parts.map((part) => part.curves.averaged)));
  return most > 1 ? `Every point is the mean of up to ${most} optimizer steps.` : null;
}

function curveCard(report, curve, state) {
  const series = [];
  const marks = [];
  const isSeveral = report.runs.length > 1;
  report.runs.forEach((run, runIndex) => {
    let offset = 0;
    run.parts.forEach((part, partIndex) => {
      const { train, heldout } = part.curves;
      if (!train.step?.length && !heldout.step?.length) return;
      if (!state.laidOver && !isSeveral && run.parts.length > 1) marks.push({ x: offset, text: part.iteration === null ? '' : `it ${part.iteration}` });
      curve.keys.forEach((key, kind) => {
        const tint = color(isSeveral ? runIndex : state.laidOver ? partIndex : kind);
        const kindName = curve.keys.length > 1 ? KINDS[kind] : '';
        const label = [isSeveral ? run.name : '', state.laidOver && run.parts.length > 1 ? part.label : '', kindName].filter(Boolean).join(', ');
        const dash = curve.keys.length > 1 && kind && (isSeveral || state.laidOver) ? '5 4' : null;
        series.push(...shownSeries(part, key, { offset: state.laidOver ? 0 : offset, label, tint, dash, smooth: state.smooth }));
      });
      const steps = Math.max(0, ...(train.step || []), ...(heldout.step || [])) + 1;
      offset += steps;
    });
  });
  if (!series.length) return null;
  const isLog = curve.mayBeLog && isSkewed(series);
  return plotCard({ ...curve, keys: false, series, marks, log: isLog, unit: isLog ? 'logarithmic' : curve.unit }, lines);
}

function shownSeries(part, key, { offset, label, tint, dash, smooth }) {
  const made = [];
  const { train, heldout } = part.curves;
  if (train[key]?.some(isNumber)) {
    const xs = train.step.map((step) => step + offset);
    const window = smooth && xs.length > 30 ? Math.max(3, Math.round(xs.length / 25)) : 1;
    const look = { name: label || 'training', key: label || 'training', xs, color: tint, dash };
    if (window > 1) made.push({ ...look, ys: train[key], faint: true, dash: null });
    made.push({ ...look, ys: window > 1 ? movingMean(train[key], window) : train[key], dots: xs.length === 1 });
  }
  if (heldout[key]?.some(isNumber)) {
    const xs = heldout.step.map((step) => step + offset);
    made.push({ name: `${label ? `${label}, ` : ''}held out`, key: label || 'training', xs, ys: heldout[key], color: tint, dots: true, dash: '1 4' });
  }
  return made;
}

function movingMean(values, window) {
  const half = window >> 1;
  return values.map((_, index) => {
    let [sum, count] = [0, 0];
    for (let place = Math.max(0, index - half); place <= Math.min(values.length - 1, index + half); place += 1) {
      if (isNumber(values[place])) { sum += values[place]; count += 1; }
    }
    return count ? sum / count : null;
  });
}

function isSkewed(series) {
  const values = series.flatMap((one) => one.ys).filter((value) => isNumber(value) && value > 0).sort((a, b) => a - b);
  return values.length > 4 && values[values.length - 1] > 30 * values[values.length >> 1];
}

function distributions(section, report) {
  const cards = report.runs.flatMap((run, runIndex) => run.histograms.map((spec) => {
    const iterations = [...new Set(spec.series.map((one) => iterationOf(one.label)).filter((number_) => number_ !== null))];
    return plotCard({
      ...spec,
      title: spec.title,
      about: report.runs.length > 1 ? `${run.name}: ${spec.about}` : spec.about,
      keys: true,
      run: runIndex,
      series: spec.series.map((one) => {
        const iteration = iterationOf(one.label);
        return {
          ...one,
          name: `${one.label} (mean ${number(one.mean)})`,
          color: one.label === 'demonstrations' ? color(6) : color(Math.max(0, iterations.indexOf(iteration))),
          dash: one.label.startsWith('demonstrations,') || one.label.endsWith('held-out') ? '4 3' : null,
        };
      }),
    }, bins);
  }));
  if (!cards.length) return;
  heading(section, 'Distributions', 'Over all pairs of an iteration; shares, so that different numbers of pairs can be compared. What lies beyond the ends is counted in the outermost bins.');
  section.append(el('div', { class: 'plots wide' }, cards));
}

function iterationOf(label) {
  const found = /iteration (\d+)/.exec(label);
  return found ? Number(found[1]) : null;
}

function firstOf(part, name) {
  const { step, [name]: values } = part.curves.train;
  return step?.[0] === 0 && part.curves.averaged === 1 ? values?.[0] : null;
}

function checks(section, report) {
  const parts = report.runs.flatMap((run) => run.parts.filter((part) => part.iteration !== null).map((part) => ({ run, ...part })));
  const answers = (name) => (part) => part.answers.train?.[name];
  const rows = [
    ['first loss', (part) => firstOf(part, 'loss'), number],
    ['what it must be: the policy is its opponent', (part) => firstOf(part, 'start_loss'), number],
    ['sampler against Megatron, nats per token', (part) => part.scored.sampler_difference, number],
    ['answers', answers('rows'), whole],
    ['answers as demonstrated (no gradient)', answers('equal_share'), share],
    ['pairs dropped for that', (part) => part.training.identical_pairs, whole],
    ['answers that repeat an earlier sample', answers('duplicate_share'), share],
    ['answers that are mostly repetition', answers('repetitive_share'), share],
    ['empty answers', answers('empty_share'), share],
    ['answers cut by the limit', answers('cut_share'), share],
    ['mean length of the answers', answers('mean_length'), number],
    ['mean length of the demonstrations', answers('real_mean_length'), number],
    ['final gradient norm', (part) => part.training.grad_norm, number],
  ].filter(([, read]) => parts.some((part) => isNumber(read(part))));
  const fired = parts.flatMap((part) => part.guards.map((guard) => ({ part, ...guard })));
  if (!rows.length && !fired.length) return;
  heading(section, 'Checks', 'What tells early that something is wrong: guards, gates, and the shape of the answers that were trained on.');
  if (fired.length) {
    section.append(el('div', { class: 'card notes' }, el('h3', null, 'Guards that fired'),
      el('ul', { class: 'small', id: 'guards' }, fired.map(({ part, stage, guard, level, message, step }) => el('li', null,
        el('b', null, `${guard} (${level}), ${stage} of ${report.runs.length > 1 ? `${part.run.name}, ` : ''}${part.label}${isNumber(step) ? `, step ${step}` : ''}: `), message)))));
  }
  section.append(el('div', { class: 'card scroll' }, el('table', { id: 'checks-table' },
    el('thead', null, el('tr', null, el('th', null, ''), parts.map((part) => el('th', null, report.runs.length > 1 ? `${part.run.name}, ${part.label}` : part.label)))),
    el('tbody', null, rows.map(([title, read, format]) => el('tr', null, el('td', null, title), parts.map((part) => el('td', null, format(read(part))))))))));
}
