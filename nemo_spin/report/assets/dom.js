// Elements, and numbers as people read them. Texts become text nodes, never markup.

function el(tag, properties, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties || {})) {
    if (name.startsWith('on')) node.addEventListener(name.slice(2), value);
    else if (name === 'style') Object.entries(value).forEach(([key, v]) => node.style.setProperty(key, v));
    else if (name === 'class') node.className = value;
    else if (name in node && name !== 'list') node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

function svg(tag, attributes, ...children) {
  const node = document.createElementNS('http://www.w3.org/2000/svg', tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name === 'stroke' || name === 'fill') node.style.setProperty(name, value);
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

const byId = (id) => document.getElementById(id);
const isNumber = (value) => typeof value === 'number' && Number.isFinite(value);
const color = (index) => `var(--c${index % 7})`;
const columnNames = (table) => Object.keys(table);

function number(value) {
  if (!isNumber(value)) return '–';
  const size = Math.abs(value);
  if (size === 0) return '0';
  if (size < 1e-3) return value.toExponential(2).replace('e-', 'e−').replace(/^-/, '−');
  const digits = size < 10 ? 3 : size < 1000 ? 1 : 0;
  return value.toLocaleString('en', { minimumFractionDigits: digits, maximumFractionDigits: digits }).replace(/^-/, '−');
}

const whole = (value) => (isNumber(value) ? Math.round(value).toLocaleString('en') : '–');
const share = (value) => (isNumber(value) ? `${(100 * value).toFixed(1)} %` : '–');

function duration(seconds) {
  if (!isNumber(seconds)) return '–';
  if (seconds < 60) return `${seconds < 10 ? seconds.toFixed(1) : Math.round(seconds)} s`;
  if (seconds < 600) return `${(seconds / 60).toFixed(1)} min`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 60) return `${minutes} min`;
  return `${Math.floor(minutes / 60)} h ${String(minutes % 60).padStart(2, '0')} min`;
}

function switcher(options, chosen, onChoose) {
  const buttons = options.map(([value, label]) =>
    el('button', {
      type: 'button',
      'aria-pressed': String(value === chosen),
      onclick: () => {
        buttons.forEach((button) => button.setAttribute('aria-pressed', String(button.value === String(value))));
        onChoose(value);
      },
      value: String(value),
    }, label));
  return el('div', { class: 'switch', role: 'group' }, buttons);
}

function picker(label, options, onChoose) {
  const list = el('select', { 'aria-label': label, onchange: () => onChoose(list.value) },
    options.map(([value, text]) => el('option', { value }, text)));
  return list;
}

function heading(section, title, lead) {
  section.append(el('h2', null, title));
  if (lead) section.append(el('p', { class: 'lead' }, lead));
}

// A debounced function: runs once, `wait` milliseconds after the last call.
function settled(wait, run) {
  let timer = 0;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(run, wait);
  };
}
