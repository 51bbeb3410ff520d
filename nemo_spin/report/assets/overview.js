// What one wants to know first: the models side by side, and where the time went.

const MODEL_COLUMNS = [
  ['greedy_score', 'score, greedy', number, 1],
  ['sampled_score', 'score, sampled', number, 1],
  ['sampled_equal_share', 'as demonstrated', share, 0],
  ['sampled_mean_length', 'answer length', number, 0],
  ['sampled_cut_share', 'cut', share, 0],
  ['policy_real_logps_per_token', 'real log‑prob per token', number, 1],
  ['policy_generated_logps_per_token', 'generated log‑prob per token', number, 0],
  ['real_perplexity', 'perplexity of demonstrations', number, 0],
  ['loss', 'held‑out loss', number, 0],
  ['margin', 'held‑out margin', number, 0],
  ['accuracy', 'held‑out accuracy', share, 0],
  ['train_loss', 'training loss', number, 0],
  ['steps', 'steps', whole, 0],
  ['seconds', 'time', duration, 0],
];

const TILES = [
  ['greedy_score', 'Score, greedy', number, 1],
  ['sampled_score', 'Score, sampled', number, 1],
  ['policy_real_logps_per_token', 'Real log‑prob per token', number, 1],
  ['sampled_mean_length', 'Answer length', number, 0],
  ['sampled_cut_share', 'Answers cut', share, -1],
];

function overview(section, report) {
  heading(section, 'Models side by side', report.runs.length > 1
    ? 'θ0 is where a run starts; every iteration makes the next model. Held-out numbers are of pairs with answers of the iteration’s opponent.'
    : 'θ0 is where the run starts; every iteration makes the next model. Held-out numbers are of pairs with answers of the iteration’s opponent.');
  for (const run of report.runs) {
    if (run.notes.length) {
      section.append(el('div', { class: 'card notes' },
        el('h3', null, report.runs.length > 1 ? `Worth knowing about ${run.name}` : 'Worth knowing'),
        el('ul', { class: 'small' }, run.notes.map((note) => el('li', null, note)))));
    }
  }
  if (report.runs.length === 1) section.append(tiles(report.runs[0]));
  section.append(modelTable(report));
  for (const run of report.runs) if (run.benchmarks) section.append(benchmarkTable(report, run));
  const scores = scorePlots(report);
  if (scores.length) section.append(el('div', { class: 'plots wide', style: { 'margin-top': '.9rem' } }, scores));
}

function tiles(run) {
  const made = [];
  for (const [name, title, format, better] of TILES) {
    const known = run.models.map((model) => model.values[name]).filter(isNumber);
    if (!known.length) continue;
    const [first, last] = [known[0], known[known.length - 1]];
    const isBetter = better * (last - first) > 0;
    const isJudged = better !== 0 && first !== last && known.length > 1;
    made.push(el('div', { class: 'card tile' },
      el('div', { class: 'quiet small' }, title),
      el('div', { class: 'value' },
        known.length > 1 ? el('span', { class: 'from' }, `${format(first)} → `) : null,
        el('span', { class: isJudged ? (isBetter ? 'better' : 'worse') : '' }, format(last)))));
  }
  const seconds = allSeconds(run);
  if (seconds) {
    made.push(el('div', { class: 'card tile' },
      el('div', { class: 'quiet small' }, 'Time in all'), el('div', { class: 'value' }, duration(seconds))));
  }
  return el('div', { class: 'tiles' }, made);
}

function allSeconds(run) {
  return [run, ...run.parts].flatMap((part) => Object.values(part.times)).reduce((sum, time) => sum + time.seconds, 0);
}

function modelTable(report) {
  const models = report.runs.flatMap((run) => run.models.map((model) => ({ run, ...model })));
  const columns = MODEL_COLUMNS.filter(([name]) => models.some((model) => isNumber(model.values[name])));
  const best = new Map(columns.map(([name, , , better]) => {
    const known = models.map((model) => model.values[name]).filter(isNumber);
    return [name, better && known.length > 1 && new Set(known).size > 1 ? Math.max(...known) : null];
  }));
  const isSeveral = report.runs.length > 1;
  const rows = models.map((model, index) => el('tr', null,
    isSeveral ? el('td', null, model.run === models[index - 1]?.run ? '' : runLabel(report, model.run)) : null,
    el('td', null, el('b', null, model.label)),
    columns.map(([name, , format]) => el('td', { class: best.get(name) === model.values[name] && isNumber(model.values[name]) ? 'best' : '' }, format(model.values[name])))));
  return el('div', { class: 'card scroll' }, el('table', { id: 'models' },
    el('thead', null, el('tr', null, isSeveral ? el('th', null, 'run') : null, el('th', null, 'model'),
      columns.map(([, title]) => el('th', null, title)))),
    el('tbody', null, rows)));
}

function benchmarkTable(report, run) {
  const { columns, rows, published, source } = run.benchmarks;
  const row = (model, quiet) => el('tr', { class: quiet ? 'quiet' : '' }, el('td', null, quiet ? model.label : el('b', null, model.label)),
    model.values.map((value) => el('td', null, share(value))));
  return el('div', { class: 'card scroll', style: { 'margin-top': '.9rem' } },
    el('h3', null, report.runs.length > 1 ? `Benchmarks of ${run.name}` : 'Benchmarks'),
    el('table', { class: 'benchmarks' },
      el('thead', null, el('tr', null, el('th', null, 'model'), columns.map((name) => el('th', null, name)))),
      el('tbody', null, rows.map((model) => row(model, false)), published.map((model) => row(model, true)))),
    source ? el('p', { class: 'quiet small', style: { 'margin-top': '.5rem' } }, `The paper’s models: ${source}, asked in the same way with another version of lm-eval.`) : null);
}

function runLabel(report, run) {
  return el('span', null, el('i', { class: 'swatch', style: { background: color(report.runs.indexOf(run)) } }), run.name);
}

function scorePlots(report) {
  const isSeveral = report.runs.length > 1;
  const most = Math.max(...report.runs.map((run) => run.models.length));
  return [['score', 'Score of held-out answers'], ['mean_length', 'Length of held-out answers']].map(([name, title]) => {
    const series = report.runs.flatMap((run, runIndex) => ['greedy', 'sampled'].map((way, index) => {
      const ys = run.models.map((model) => model.values[`${way}_${name}`]);
      return {
        name: isSeveral ? `${run.name}, ${way}` : way,
        xs: ys.map((_, place) => place),
        ys,
        color: color(isSeveral ? runIndex : index),
        dash: way === 'sampled' ? '5 4' : null,
        dots: true,
        joined: true,
      };
    })).filter((one) => one.ys.filter(isNumber).length > 1);
    return series.length ? plotCard({
      title, series, unit: name === 'mean_length' ? 'tokens' : '', keys: true,
      xName: 'model', xText: (place) => `θ${place}`, xTicks: Array.from({ length: most }, (_, place) => place),
    }, lines) : null;
  }).filter(Boolean);
}

const STAGE_COLORS = { prepare: 6, generate: 1, score: 2, train: 0, sft: 0, export: 3, evaluate: 5 };

function timeSection(section, report) {
  const rows = report.runs.flatMap((run) => [
    { label: 'before the first iteration', times: run.times }, ...run.parts,
  ].filter((part) => Object.keys(part.times).length).map((part) => ({
    label: report.runs.length > 1 ? `${run.name}, ${part.label}` : part.label,
    times: Object.entries(part.times),
    total: Object.values(part.times).reduce((sum, time) => sum + time.seconds, 0),
  })));
  if (!rows.length) return;
  heading(section, 'Where the time went', 'All attempts of a stage together.');
  const longest = Math.max(...rows.map((row) => row.total)) || 1;
  const stages = [...new Set(rows.flatMap((row) => row.times.map(([stage]) => stage)))];
  section.append(el('div', { class: 'card' },
    el('div', { class: 'bars' }, rows.map((row) => el('div', { class: 'timed' },
      el('span', null, row.label),
      el('div', { class: 'bar', style: { width: `${(100 * row.total) / longest}%` } }, row.times.map(([stage, time]) => el('span', {
        style: { 'flex-grow': Math.max(time.seconds, row.total / 500), background: color(STAGE_COLORS[stage] ?? 4) },
        title: `${stage}: ${duration(time.seconds)}`,
      }))),
      el('span', { class: 'total' }, duration(row.total))))),
    el('div', { class: 'scroll', style: { 'margin-top': '1rem' } }, el('table', null,
      el('thead', null, el('tr', null, el('th', null, ''), stages.map((stage) => el('th', null,
        el('i', { class: 'swatch', style: { background: color(STAGE_COLORS[stage] ?? 4) } }), stage)), el('th', null, 'in all'))),
      el('tbody', null, rows.map((row) => {
        const times = Object.fromEntries(row.times);
        return el('tr', null, el('td', null, row.label), stages.map((stage) => el('td', null,
          times[stage] ? duration(times[stage].seconds) : '–',
          times[stage]?.attempts > 1 ? el('span', { class: 'quiet small' }, ` (${times[stage].attempts} attempts)`) : null)), el('td', null, el('b', null, duration(row.total))));
      }))))));  throughput(section, report);
}

const PHASES = [['setup', 'start'], ['data', 'data'], ['forward_backward', 'forward and backward'], ['optimizer', 'optimizer'],
  ['checkpoint', 'checkpoints'], ['evaluation', 'evaluation'], ['logging', 'logging']];

function throughput(section, report) {
  const parts = report.runs.flatMap((run) => run.parts.map((part) => ({ run, ...part })));
  const rows = [
    ['scoring: needed tokens per second', (part) => part.scored.tokens_per_second, whole],
    ['training: needed tokens per second', (part) => part.training.tokens_per_second, whole],
    ['pairs per second, of scoring and training together', (part) => part.training.pairs_per_second_with_scoring, number],
    ['scoring: needed TFLOP/s of each device', (part) => part.scored.model_tflops, number],
    ['training: needed TFLOP/s of each device', (part) => part.training.model_tflops, number],
    ['training: share of the device’s peak', (part) => part.training.peak_share, share],
    ['training: token slots that were needed', (part) => part.training.useful_share, share],
    ['training: prompt tokens saved by sharing', (part) => part.training.saved_prompt_tokens, whole],
    ['training: peak memory, GiB', (part) => part.training.peak_memory_gib, number],
    ...PHASES.map(([name, title]) => [`training: ${title}`, (part) => part.training[`${name}_seconds`], duration]),
  ].filter(([, read]) => parts.some((part) => isNumber(read(part))));
  if (!rows.length) return;
  section.append(el('div', { class: 'card scroll', style: { 'margin-top': '.9rem' } }, el('table', { id: 'throughput-table' },
    el('thead', null, el('tr', null, el('th', null, ''), parts.map((part) => el('th', null, report.runs.length > 1 ? `${part.run.name}, ${part.label}` : part.label)))),
    el('tbody', null, rows.map(([title, read, format]) => el('tr', null, el('td', null, title),
      parts.map((part) => el('td', null, format(read(part))))))))));
}
