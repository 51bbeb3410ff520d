// Puts the page together: the summary at once, the samples when they have been read.

const report = JSON.parse(byId('summary').textContent);

function header() {
  const links = [['overview', 'Models'], ['training', 'Training'], ['distributions', 'Distributions'], ['checks', 'Checks'],
    ['time', 'Time'], ['samples-section', 'Samples'], ['settings', 'Settings']]
    .filter(([id]) => byId(id).childNodes.length || id === 'samples-section');
  const title = report.runs.length > 1 ? `${report.runs.length} runs` : report.runs[0].name;
  const status = report.runs.length > 1 ? '' : report.runs[0].status;
  byId('header').append(
    el('h1', null, title), el('span', { class: 'quiet small' }, status),
    el('nav', { 'aria-label': 'Sections' }, links.map(([id, text]) => el('a', { href: `#${id}` }, text))),
    el('button', { type: 'button', class: 'theme', id: 'theme', onclick: changeTheme, 'aria-label': 'Light or dark' }, '◐'));
}

function changeTheme() {
  const root = document.documentElement;
  const isDark = root.dataset.theme ? root.dataset.theme === 'dark' : matchMedia('(prefers-color-scheme: dark)').matches;
  root.dataset.theme = isDark ? 'light' : 'dark';
}

overview(byId('overview'), report);
training(byId('training'), report);
distributions(byId('distributions'), report);
checks(byId('checks'), report);
timeSection(byId('time'), report);
settings(byId('settings'), report);
header();
byId('footer').append(`Written by nemo-spin ${report.version} on ${report.written}. Everything is in this file; it loads nothing.`);

document.addEventListener('DOMContentLoaded', () => {
  const holder = byId('samples');
  const runs = JSON.parse(holder.textContent);
  holder.remove();
  new SampleList(byId('samples-section'), report, runs);
});
