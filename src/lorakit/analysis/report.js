for (const plot of document.querySelectorAll('[data-chart]')) {
  const data = JSON.parse(plot.dataset.chart), [low, high] = data.x;
  const steps = [...new Set(data.series.flatMap(s => s.x))].sort((a, b) => a - b);
  const cursor = Object.assign(document.createElement('div'), {className: 'cursor', hidden: true});
  const tip = Object.assign(document.createElement('div'), {className: 'tip', hidden: true});
  tip.setAttribute('role', 'status');
  plot.append(cursor, tip);
  let at = -1;
  const nearest = (list, x) => {
    let a = 0, b = list.length - 1;
    while (b - a > 1) { const m = (a + b) >> 1; if (list[m] < x) a = m; else b = m; }
    return Math.abs(list[a] - x) <= Math.abs(list[b] - x) ? a : b;
  };
  const show = index => {
    at = index;
    const step = steps[index], left = (step - low) / (high - low);
    const lines = [data.over + ' ' + step.toLocaleString('en')];
    for (const s of data.series) {
      const i = nearest(s.x, step);
      if (s.x[i] === step) lines.push(s.name + '  ' + s.y[i]);
    }
    tip.replaceChildren(...lines.flatMap(line => [document.createTextNode(line), document.createElement('br')]));
    cursor.style.left = tip.style.left = 100 * left + '%';
    tip.style.transform = left > 0.5 ? 'translateX(calc(-100% - 8px))' : 'translateX(8px)';
    cursor.hidden = tip.hidden = false;
  };
  const hide = () => { cursor.hidden = tip.hidden = true; at = -1; };
  plot.addEventListener('pointermove', event => {
    const box = plot.getBoundingClientRect();
    show(nearest(steps, low + (event.clientX - box.left) / box.width * (high - low)));
  });
  plot.addEventListener('pointerleave', hide);
  plot.addEventListener('blur', hide);
  plot.addEventListener('keydown', event => {
    const move = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (event.key === 'Escape') hide();
    if (!move) return;
    event.preventDefault();
    show(Math.min(Math.max(at < 0 ? (move > 0 ? 0 : steps.length - 1) : at + move, 0), steps.length - 1));
  });
}
