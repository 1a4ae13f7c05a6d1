// Return what a reader cannot see on the page, as sentences: parts that are cut, and pictures that are too small.
() => {
  const found = [];
  const name = (e) => `${e.tagName.toLowerCase()}.${[...e.classList].join(".")} "${e.textContent.trim().slice(0, 60)}"`;
  const article = document.querySelector("article");
  document.querySelectorAll("details").forEach((each) => (each.open = true));
  const wider = document.documentElement.scrollWidth - window.innerWidth;
  if (wider > 0) found.push(`the page is ${wider} pixels wider than the window`);
  const scrolls = (e) => ["auto", "scroll"].includes(getComputedStyle(e).overflowX);
  for (let e = article.parentElement; e !== document.body; e = e.parentElement)
    if (scrolls(e) && e.scrollWidth > e.clientWidth + 1) found.push(`${e.className} scrolls sideways`);
  for (const e of article.querySelectorAll("*")) {
    if (!e.clientWidth || e.scrollWidth <= e.clientWidth + 1 || e.closest(".sd-stretched-link, mjx-assistive-mml")) continue;
    const style = getComputedStyle(e);
    const borders = parseFloat(style.borderTopWidth) + parseFloat(style.borderBottomWidth);
    if (scrolls(e) && e.offsetHeight - e.clientHeight - borders < 5) found.push(`no scroll bar: ${name(e)}`);
    if (["hidden", "clip"].includes(style.overflowX)) found.push(`cut: ${name(e)}`);
  }
  const edge = article.getBoundingClientRect().right + 8; // links at headings stand in the margin
  for (const e of article.querySelectorAll("p, li, td, th, dt, dd, code, pre, img, figcaption, mjx-container")) {
    let frame = e.parentElement;
    while (frame !== article && !scrolls(frame)) frame = frame.parentElement;
    const right = e.getBoundingClientRect().right;
    if (frame === article && right > edge) found.push(`${Math.round(right - edge)} pixels outside: ${name(e)}`);
    const cell = e.closest("td");
    if (cell && e !== cell && !e.closest("mjx-assistive-mml") && right > cell.getBoundingClientRect().right + 1)
      found.push(`runs into the next column: ${name(e)}`);
  }
  return found;
}
