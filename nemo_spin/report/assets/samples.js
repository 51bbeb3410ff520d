// The samples: a list that holds only the rows in view, a search over all of them.

const SORTS = [
  ['', 'as prepared', null],
  ['shortest', 'shortest answer first', (answer) => answer.n],
  ['longest', 'longest answer first', (answer) => -answer.n],
  ['margin', 'smallest margin first', (answer) => answer.g],
  ['-margin', 'largest margin first', (answer) => -answer.g],
  ['change', 'demonstrations that fell most', (answer) => answer.d],
  ['score', 'lowest score first', (answer) => answer.s],
];
const FILTERS = [
  ['', 'all answers', null],
  ['equal', 'some answer as demonstrated', (answer) => answer.e],
  ['cut', 'some answer cut', (answer) => answer.c],
  ['negative', 'some margin below 0', (answer) => answer.g < 0],
  ['wrong', 'some score below 1', (answer) => answer.s < 1],
];
const KIND_NAMES = { drawn: 'training answer', sampled: 'sampled', greedy: 'greedy' };
const PREFERRED = ['greedy', 'drawn', 'sampled'];

class SampleList {
  constructor(section, report, runs) {
    this.report = report;
    this.runs = runs;
    this.query = '';
    this.filter = '';
    this.sort = '';
    this.split = '';
    this.count = el('span', { class: 'quiet small', id: 'sample-count', 'aria-live': 'polite' });
    this.search = el('input', {
      type: 'search', id: 'sample-search', placeholder: 'Search prompts, demonstrations and answers', 'aria-label': 'Search samples',
      oninput: settled(120, () => { this.query = this.search.value; this.update(); }),
    });
    this.extra = el('span', { class: 'tools', style: { margin: '0' } });
    this.body = el('div', { class: 'body' });
    this.head = el('div', { class: 'head' });
    this.list = el('div', { class: 'list card', id: 'sample-list', tabIndex: 0, 'aria-label': 'Samples' }, this.head, this.body);
    this.list.addEventListener('scroll', () => this.schedule(), { passive: true });
    new ResizeObserver(() => this.schedule()).observe(this.list);
    heading(section, 'Samples', 'Prompts as the template rendered them, the demonstrations, and what every model answered. A row opens with everything that is known of it.');
    section.append(el('div', { class: 'tools' }, this.search, this.extra, this.count), this.list);
    this.choose(runs.findIndex((run) => run.id.length) < 0 ? 0 : runs.findIndex((run) => run.id.length));
  }

  choose(index) {
    this.index = index;
    this.run = this.runs[index];
    this.haystacks = null;
    this.models = [...new Set(this.run.answers.flatMap((answers) => answers.map((answer) => answer.m)))].sort((a, b) => a - b);
    this.addTools();
    this.list.style.setProperty('--columns', `minmax(9rem, 1.3fr) repeat(${this.models.length + 1}, minmax(8rem, 1fr))`);
    this.head.replaceChildren(...['prompt', 'demonstration', ...this.models.map((model) => `θ${model}`)].map((title) => el('div', null, title)));
    const wide = this.models.length > 3 ? `${(this.models.length + 2) * 11}rem` : '0';
    [this.head, this.body].forEach((node) => node.style.setProperty('min-width', innerWidth > 760 ? wide : '0'));
    this.update();
  }

  addTools() {
    const has = (test) => this.run.answers.some((answers) => answers.some(test));
    const offered = (options, test) => options.filter(([value, , read]) => !value || has((answer) => test(read(answer))));
    const tools = [];
    if (this.runs.length > 1) {
      const runs = picker('Run', this.report.runs.map((run, index) => [String(index), run.name]), (value) => this.choose(Number(value)));
      runs.value = String(this.index);
      tools.push(runs);
    }
    this.split = this.filter = this.sort = '';
    const splits = [...new Set(this.run.split)];
    if (splits.length > 1) {
      tools.push(picker('Split', [['', 'training and held out'], ['train', 'training'], ['heldout', 'held out']], (value) => { this.split = value; this.update(); }));
    }
    tools.push(
      picker('Filter', offered(FILTERS, Boolean), (value) => { this.filter = value; this.update(); }),
      picker('Order', offered(SORTS, isNumber), (value) => { this.sort = value; this.update(); }));
    this.extra.replaceChildren(...tools);
  }

  haystack(row) {
    if (!this.haystacks) this.haystacks = new Array(this.run.id.length);
    if (this.haystacks[row] === undefined) {
      const { id, prompt, real, answers } = this.run;
      this.haystacks[row] = [id[row], prompt[row], real[row], ...answers[row].map((answer) => answer.t)].join('\n').toLowerCase();
    }
    return this.haystacks[row];
  }

  update() {
    const query = this.query.toLowerCase();
    const test = FILTERS.find(([value]) => value === this.filter)[2];
    const value = SORTS.find(([name]) => name === this.sort)[2];
    const rows = [];
    for (let row = 0; row < this.run.id.length; row += 1) {
      if (this.split && this.run.split[row] !== this.split) continue;
      if (test && !this.run.answers[row].some(test)) continue;
      if (query && !this.haystack(row).includes(query)) continue;
      rows.push(row);
    }
    if (value) {
      const keys = new Map(rows.map((row) => [row, Math.min(...this.run.answers[row].map(value).filter(isNumber))]));
      rows.sort((a, b) => (keys.get(a) === keys.get(b) ? a - b : keys.get(a) - keys.get(b)));
    }
    this.rows = rows;
    const inAll = Object.values(this.run.available).reduce((sum, count) => sum + count, 0);
    const here = this.run.id.length;
    this.count.textContent = `${whole(rows.length)} of ${whole(here)}${inAll > here ? ` (evenly chosen from ${whole(inAll)})` : ''}`;
    this.list.scrollTop = 0;
    this.forget();
    this.render();
  }

  schedule() {
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => { this.frame = 0; this.render(); });
  }

  forget() {
    this.shown = new Map(); // place -> element; elements stay while they are in view
    this.body.replaceChildren();
  }

  render() {
    const height = Number(getComputedStyle(document.documentElement).getPropertyValue('--row')) || 78;
    if (height !== this.height) this.forget();
    this.height = height;
    this.body.style.height = `${Math.max(this.rows.length * this.height, 1)}px`;
    if (!this.rows.length) {
      this.body.replaceChildren(el('div', { class: 'empty' }, this.run.id.length ? 'Nothing found.' : 'No samples yet.'));
      this.body.style.height = 'auto';
      return; // the next update forgets it
    }
    const first = Math.max(0, Math.floor(this.list.scrollTop / this.height) - 4);
    const last = Math.min(this.rows.length, first + Math.ceil(this.list.clientHeight / this.height) + 9);
    for (const [place, element] of this.shown) {
      if (place < first || place >= last) {
        element.remove();
        this.shown.delete(place);
      }
    }
    for (let place = last - 1; place >= first; place -= 1) {
      if (this.shown.has(place)) continue;
      const element = this.row(place);
      this.shown.set(place, element);
      this.body.insertBefore(element, this.shown.get(place + 1) || null); // the tab key goes by this order
    }
  }

  row(place) {
    const row = this.rows[place];
    const lastModel = Math.max(...this.run.answers[row].map((answer) => answer.m));
    const cells = [
      this.cell('prompt', '', this.run.prompt[row], ''),
      this.cell('real', 'real', this.run.real[row], ''),
      ...this.models.map((model) => {
        const answers = this.run.answers[row].filter((answer) => answer.m === model);
        const answer = PREFERRED.map((kind) => answers.find((one) => one.k === kind)).find(Boolean);
        const isLast = model === lastModel ? ' last' : '';
        return this.cell(`model judged${isLast}`, `θ${model}`, answer ? answer.t : '', answer ? judged(answer, false) : '');
      }),
    ];
    return el('div', {
      class: 'row', tabIndex: 0, role: 'button', 'data-place': String(place), style: { top: `${place * this.height}px` },
      onclick: () => this.open(place),
      onkeydown: (event) => { if (event.key === 'Enter') this.open(place); },
    }, cells);
  }

  cell(kind, said, text, tag) {
    return el('div', { class: `cell ${kind}` },
      said ? el('span', { class: 'said' }, said) : null,
      el('div', { class: 'text' }, marked(text.slice(0, 400), this.query)),
      tag ? el('div', { class: 'tag' }, tag) : null);
  }

  open(place) {
    const dialog = byId('detail');
    const row = this.rows[place];
    const go = (to) => { if (to >= 0 && to < this.rows.length) this.open(to); };
    const block = (title, about, text, kind) => el('div', { class: 'block' },
      el('header', null, el('h3', null, title), el('span', { class: 'quiet small' }, about)),
      el('div', { class: `full ${kind}` }, text === '' ? el('span', { class: 'quiet' }, '(empty)') : marked(text, this.query)));
    dialog.replaceChildren(
      el('div', { class: 'bar-top' },
        el('span', { class: 'mono quiet', title: this.run.id[row] }, `${whole(place + 1)} / ${whole(this.rows.length)} · ${this.run.split[row] === 'heldout' ? 'held out' : 'training'} · ${this.run.id[row]}`),
        el('button', { type: 'button', onclick: () => go(place - 1), 'aria-label': 'Previous', disabled: place === 0 }, '‹'),
        el('button', { type: 'button', onclick: () => go(place + 1), 'aria-label': 'Next', disabled: place === this.rows.length - 1 }, '›'),
        el('button', { type: 'button', onclick: () => dialog.close(), 'aria-label': 'Close' }, 'Close')),
      block('Prompt', '', this.run.prompt[row], ''),
      block('Demonstration', '', this.run.real[row], 'real'),
      ...[...this.run.answers[row]].sort((a, b) => a.m - b.m).map((answer) => block(`θ${answer.m}`, [KIND_NAMES[answer.k] || answer.k, judged(answer, true)].filter(Boolean).join(' · '), answer.t, '')));
    dialog.onkeydown = (event) => {
      if (event.key === 'ArrowLeft') go(place - 1);
      if (event.key === 'ArrowRight') go(place + 1);
    };
    if (!dialog.open) dialog.showModal();
    dialog.scrollTop = 0;
  }
}

function judged(answer, isWhole) {
  return [
    isNumber(answer.s) ? `score ${number(answer.s)}` : '',
    isNumber(answer.g) ? `margin ${number(answer.g)}` : '',
    isWhole && isNumber(answer.d) ? `demonstration ${answer.d > 0 ? '+' : ''}${number(answer.d)} nats` : '',
    answer.e ? 'as demonstrated' : '',
    answer.c ? 'cut' : '',
    isNumber(answer.n) ? `${answer.n} tokens` : '',
  ].filter(Boolean).join(' · ');
}

// The text as nodes, with every place where the query stands marked.
function marked(text, query) {
  if (!query) return [text];
  const lower = text.toLowerCase();
  const wanted = query.toLowerCase();
  if (lower.length !== text.length) return [text]; // a letter whose small form is longer: places would differ
  const nodes = [];
  let from = 0;
  for (let at = lower.indexOf(wanted); at >= 0; at = lower.indexOf(wanted, from)) {
    nodes.push(text.slice(from, at), el('mark', null, text.slice(at, at + wanted.length)));
    from = at + wanted.length;
  }
  nodes.push(text.slice(from));
  return nodes;
}
