// Reads the facts and draws the page.

const facts = JSON.parse(document.getElementById('facts').textContent);
const sections = [totalsSection, brokenSection, mapSection, costsSection, compareSection].map((section) => section(facts));
const title = element('header', {}, element('h1', {}, 'Zoo report'), element('p', { class: 'quiet' }, facts.place));
document.getElementById('report').replaceChildren(title, ...sections.filter(Boolean));
