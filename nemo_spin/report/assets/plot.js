// Line plots and histograms as SVG, drawn again whenever their width changes.

const HEIGHT = 190;
const EDGE = { left: 52, right: 10, top: 12, bottom: 24 };

function niceTicks(low, high, wanted) {
  const rough = (high - low) / wanted || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= rough);
  const ticks = [];
  for (let index = Math.ceil(low / step - 1e-9); index * step <= high + step * 1e-9; index += 1) ticks.push(index * step);
  return ticks;
}

function logTicks(low, high) {
  const ticks = [];
  for (let power = Math.floor(low); power <= Math.ceil(high); power += 1) {
    for (const factor of high - low < 2 ? [1, 2, 5] : [1]) {
      const tick = Math.log10(factor) + power;
      if (tick >= low && tick <= high) ticks.push(tick);
    }
  }
  return ticks;
}

function tickLabel(value) {
  const size = Math.abs(value);
  if (size < 1e-12) return '0';
  if (size >= 1e5 || size < 1e-3) return value.toExponential(1).replace('.0e', 'e').replace('e+', 'e').replace(/-/g, '−');
  return String(Number(value.toPrecision(4)).toLocaleString('en', { maximumFractionDigits: 6 })).replace('-', '−');
}

function extent(values) {
  let low = Infinity;
  let high = -Infinity;
  for (const value of values) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return low > high ? [0, 1] : [low, high];
}

// A frame: scales, axes, marks. Returns the svg and how values become places.
function frame(width, spec, [xLow, xHigh], [yLow, yHigh], yTicks, yText) {
  const right = width - EDGE.right;
  const bottom = HEIGHT - EDGE.bottom;
  const x = (value) => EDGE.left + ((value - xLow) / (xHigh - xLow || 1)) * (right - EDGE.left);
  const y = (value) => bottom - ((value - yLow) / (yHigh - yLow || 1)) * (bottom - EDGE.top);
  const root = svg('svg', { viewBox: `0 0 ${width} ${HEIGHT}`, height: HEIGHT, role: 'img', 'aria-label': spec.title });
  for (const tick of yTicks) {
    root.append(
      svg('line', { class: 'axis', x1: EDGE.left, x2: right, y1: y(tick), y2: y(tick) }),
      svg('text', { x: EDGE.left - 7, y: y(tick) + 3.5, 'text-anchor': 'end' }, yText(tick)));
  }
  for (const tick of spec.xTicks || niceTicks(xLow, xHigh, Math.max(2, Math.floor(width / 95)))) {
    root.append(svg('text', { x: x(tick), y: HEIGHT - 7, 'text-anchor': 'middle' }, spec.xText ? spec.xText(tick) : tickLabel(tick)));
  }
  for (const mark of spec.marks || []) {
    if (mark.x > xLow) root.append(svg('line', { class: 'zero', x1: x(mark.x), x2: x(mark.x), y1: EDGE.top - 4, y2: bottom }));
    root.append(svg('text', { x: x(mark.x) + 3, y: EDGE.top - 2 }, mark.text));
  }
  if (spec.zero && yLow < 0 && yHigh > 0) {
    root.append(svg('line', { class: 'zero', x1: EDGE.left, x2: right, y1: y(0), y2: y(0) }));
  }
  return { root, x, y, bottom, right };
}

function pathOf(series, x, y) {
  let path = '';
  let isOpen = false;
  series.xs.forEach((value, index) => {
    const height = series.ys[index];
    if (!isNumber(height)) { isOpen = false; return; }
    path += `${isOpen ? 'L' : 'M'}${x(value).toFixed(1)} ${y(height).toFixed(1)}`;
    isOpen = true;
  });
  return path;
}

function lines(spec, width) {
  const drawn = spec.series.map((series) => ({
    ...series,
    ys: spec.log ? series.ys.map((value) => (value > 0 ? Math.log10(value) : null)) : series.ys,
  }));
  const xs = extent(drawn.flatMap((series) => extent(series.xs)));
  if (xs[0] === xs[1]) { xs[0] -= 0.5; xs[1] += 0.5; }
  let [low, high] = spec.range || extent(drawn.flatMap((series) => series.ys.filter(isNumber)));
  if (spec.zero) { low = Math.min(low, 0); high = Math.max(high, 0); }
  // A constant that was smoothed differs in its last bits: ticks between those could not be counted.
  const isFlat = high - low <= 1e-9 * Math.max(Math.abs(low), Math.abs(high));
  const room = (isFlat ? 0 : (high - low) * 0.06) || Math.abs(high) * 0.1 || 0.5;
  if (!spec.range) { low -= room; high += room; }
  const ticks = spec.log ? logTicks(low, high) : niceTicks(low, high, 4);
  const text = spec.log ? (tick) => tickLabel(10 ** tick) : tickLabel;
  const { root, x, y, bottom } = frame(width, spec, xs, [low, high], ticks, text);
  for (const series of drawn) {
    const look = { class: `curve ${series.faint ? 'faint' : ''}`, stroke: series.color, d: pathOf(series, x, y) };
    if (series.dash) look['stroke-dasharray'] = series.dash;
    root.append(svg('path', look));
    if (series.dots) {
      series.xs.forEach((value, index) => {
        if (isNumber(series.ys[index])) root.append(svg('circle', { class: 'dot', cx: x(value), cy: y(series.ys[index]), r: 3.2, stroke: series.color }));
      });
    }
  }
  const cursor = svg('line', { class: 'cursor', y1: EDGE.top, y2: bottom });
  root.append(cursor);
  follow(root, cursor, width, spec, xs, x);
  return root;
}

// Shows the values next to the pointer.
function follow(root, cursor, width, spec, [xLow, xHigh], x) {
  const shown = spec.series.filter((series) => !series.faint && series.xs.length);
  root.addEventListener('pointermove', (event) => {
    const box = root.getBoundingClientRect();
    const part = ((event.clientX - box.left) * (width / box.width) - EDGE.left) / (width - EDGE.left - EDGE.right);
    const at = xLow + part * (xHigh - xLow);
    const rows = [];
    let nearest = null;
    for (const series of shown) {
      const index = closest(series.xs, at);
      const distance = Math.abs(series.xs[index] - at);
      if (distance > (xHigh - xLow) * 0.03 + 0.6) continue;
      if (nearest === null || distance < Math.abs(nearest - at)) nearest = series.xs[index];
      rows.push(el('div', { class: 'pair' },
        el('span', null, el('i', { class: 'swatch', style: { background: series.color } }), series.name),
        el('b', null, number(series.ys[index]))));
    }
    if (!rows.length) { hideTip(cursor); return; }
    const place = x(nearest);
    cursor.setAttribute('x1', place);
    cursor.setAttribute('x2', place);
    cursor.style.visibility = 'visible';
    showTip(event, [el('div', { class: 'quiet' }, `${spec.xName || 'step'} ${spec.xText ? spec.xText(nearest) : whole(nearest)}`), ...rows]);
  });
  root.addEventListener('pointerleave', () => hideTip(cursor));
}

function closest(sorted, wanted) {
  let low = 0;
  let high = sorted.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < wanted) low = middle;
    else high = middle;
  }
  return Math.abs(sorted[low] - wanted) <= Math.abs(sorted[high] - wanted) ? low : high;
}

function showTip(event, content) {
  const tip = byId('tip');
  tip.replaceChildren(...content);
  tip.hidden = false;
  const left = event.clientX + 16 + tip.offsetWidth > innerWidth ? event.clientX - tip.offsetWidth - 12 : event.clientX + 16;
  tip.style.left = `${Math.max(4, left)}px`;
  tip.style.top = `${Math.max(4, Math.min(event.clientY + 12, innerHeight - tip.offsetHeight - 6))}px`;
}

function hideTip(cursor) {
  byId('tip').hidden = true;
  if (cursor) cursor.style.visibility = 'hidden';
}

// Shares of each series in common bins, as filled outlines.
function bins(spec, width) {
  const shares = spec.series.map((series) => series.counts.map((count) => count / series.number));
  const highest = Math.max(...shares.flat()) * 1.06;
  const range = [spec.edges[0], spec.edges[spec.edges.length - 1]];
  const { root, x, y, bottom, right } = frame(width, { ...spec, zero: false }, range, [0, highest], niceTicks(0, highest, 4), (tick) => `${tickLabel(100 * tick)} %`);
  if (range[0] < 0 && range[1] > 0) root.append(svg('line', { class: 'zero', x1: x(0), x2: x(0), y1: EDGE.top, y2: bottom }));
  shares.forEach((values, index) => {
    const steps = values.map((value, bin) => `L${x(spec.edges[bin]).toFixed(1)} ${y(value).toFixed(1)}L${x(spec.edges[bin + 1]).toFixed(1)} ${y(value).toFixed(1)}`);
    const outline = `M${x(range[0])} ${bottom}${steps.join('')}L${right} ${bottom}`;
    const { color: tint, dash } = spec.series[index];
    root.append(svg('path', { class: 'area', fill: tint, d: `${outline}Z` }));
    root.append(svg('path', { class: 'curve', stroke: tint, d: outline, ...(dash ? { 'stroke-dasharray': dash } : {}) }));
  });
  root.addEventListener('pointermove', (event) => {
    const box = root.getBoundingClientRect();
    const part = ((event.clientX - box.left) * (width / box.width) - EDGE.left) / (right - EDGE.left);
    const bin = Math.floor(part * (spec.edges.length - 1));
    if (bin < 0 || bin >= spec.edges.length - 1) { hideTip(); return; }
    const upper = spec.unit === 'tokens' ? spec.edges[bin + 1] - 1 : spec.edges[bin + 1];
    const text = spec.unit === 'tokens' && upper === spec.edges[bin] ? `${upper}` : `${tickLabel(spec.edges[bin])} to ${tickLabel(upper)}`;
    showTip(event, [
      el('div', { class: 'quiet' }, `${text} ${spec.unit}`),
      ...spec.series.map((series, index) => el('div', { class: 'pair' },
        el('span', null, el('i', { class: 'swatch', style: { background: series.color } }), series.name),
        el('b', null, share(shares[index][bin])))),
    ]);
  });
  root.addEventListener('pointerleave', () => hideTip());
  return root;
}

function keyOf(series) {
  const sample = series.dots && !series.joined
    ? svg('circle', { class: 'dot', cx: 11, cy: 5, r: 3.2, stroke: series.color })
    : svg('line', { class: 'curve', x1: 1, x2: 21, y1: 5, y2: 5, stroke: series.color, ...(series.dash ? { 'stroke-dasharray': series.dash } : {}) });
  return el('span', null, svg('svg', { viewBox: '0 0 22 10', 'aria-hidden': 'true' }, sample), series.key || series.name);
}

// A card with a plot that follows its width. `draw` is `lines` or `bins`.
function plotCard(spec, draw) {
  const canvas = el('div', { class: 'plot' });
  const keys = new Map();
  for (const series of spec.series) {
    if (!series.faint && !keys.has(series.key || series.name)) keys.set(series.key || series.name, series);
  }
  const card = el('div', { class: 'card', 'data-plot': spec.title },
    el('h3', null, spec.title, spec.unit ? el('span', { class: 'quiet small' }, ` · ${spec.unit}`) : null),
    spec.about ? el('p', { class: 'quiet small' }, spec.about) : null,
    canvas,
    keys.size > 1 || spec.keys ? el('div', { class: 'keys' }, [...keys.values()].map(keyOf)) : null);
  let last = 0;
  new ResizeObserver(([entry]) => {
    const width = Math.round(entry.contentRect.width);
    if (width > 0 && width !== last) {
      last = width;
      canvas.replaceChildren(draw(spec, width));
    }
  }).observe(canvas);
  return card;
}
