"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const color = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const faded = (hex, alpha) => hex + Math.round(alpha * 255).toString(16).padStart(2, "0");
  const FONT = '12px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif';

  // Numbers as the page's own: three significant digits, whole numbers in full.
  const POWERS = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" };
  const raised = (n) => "10" + String(n).replace(/[-0-9]/g, (c) => POWERS[c]);
  const written = (v, digits = 3) => {
    if (v === 0) return "0";
    const exponent = Math.floor(Math.log10(Math.abs(v)) + 1e-12);
    if (exponent < -4 || exponent > 14) {
      const head = v / 10 ** exponent;
      return (Math.abs(head - 1) < 1e-9 ? "" : Number(head.toPrecision(digits)) + " × ") + raised(exponent);
    }
    const places = Number.isInteger(v) ? 0 : Math.max(0, digits - 1 - exponent);
    return v.toLocaleString("en-US", { minimumFractionDigits: places, maximumFractionDigits: places }).replace("-", "−");
  };
  const value = (chart, v) => (chart.percent ? (100 * v).toFixed(1) + " %" : written(v));

  // Ticks: large counts in short (400k), all small ones as powers of ten, the rest with the digits that tell them apart.
  const ticks = (chart) => (u, splits) => {
    const largest = Math.max(...splits.filter((v) => v !== null).map(Math.abs));
    return splits.map((v) => {
      if (v === null) return "";
      if (chart && chart.percent) return Number((100 * v).toPrecision(6)) + " %";
      if (Math.abs(v) >= 1e6) return Number((v / 1e6).toPrecision(6)) + "M";
      if (Math.abs(v) >= 1e4) return Number((v / 1e3).toPrecision(6)) + "k";
      if (v !== 0 && (largest < 1e-3 || Math.abs(v) < 1e-5)) {
        const exponent = Math.floor(Math.log10(Math.abs(v)) + 1e-9);
        const head = Number((v / 10 ** exponent).toPrecision(3));
        return (head === 1 ? "" : head + "×") + raised(exponent);
      }
      return String(Number(v.toPrecision(6))).replace("-", "−");
    });
  };
  // Of an axis of powers of ten: the powers, and the more of what lies between the fewer they are.
  const logMarks = (axis) => (u, splits) => {
    const { min, max } = u.scales[axis];
    const span = Math.log10(max / min);
    const heads = span > 2 ? [1] : span > 1 ? [1, 3] : span > 0.5 ? [1, 2, 3, 5] : [1, 2, 3, 4, 5, 6, 7, 8, 9];
    const head = (v) => v / 10 ** Math.floor(Math.log10(v) + 1e-9);  // uPlot's first one is the end of the scale
    return splits.map((v) => (v > 0 && heads.some((one) => Math.abs(head(v) - one) < 1e-6) ? v : null));
  };

  const NAMES = ["--c1", "--c2", "--c3", "--c4", "--c5", "--c6"];
  const drawn = [];

  function draw(figure) {
    const chart = data[figure.dataset.section][figure.dataset.index];
    const holder = figure.querySelector(".canvas");
    const button = figure.querySelector(".log");
    const readout = figure.querySelector(".readout");
    if (chart.logNow === undefined) chart.logNow = chart.y_log;
    const columns = [chart.x], series = [{}], bands = [], lines = [];
    chart.series.forEach((one, i) => {
      const ink = color(NAMES[i % NAMES.length]);
      if (one.low) {
        const edge = { stroke: faded(ink, 0.35), width: 1, points: { show: false }, spanGaps: true };
        columns.push(one.high, one.low);
        series.push({ ...edge }, { ...edge });
        bands.push({ series: [series.length - 2, series.length - 1], fill: faded(ink, 0.18) });
      }
      lines.push({ index: series.length, label: one.label, ink });
      columns.push(one.y);
      series.push({ stroke: ink, width: 1.75, spanGaps: true, points: { show: chart.dots, size: 6, width: 1.5, fill: color("--card"), stroke: ink } });
    });
    const smallest = Math.min(...columns.slice(1).flat().filter((v) => v !== null));
    const canLog = smallest > 0;
    const log = chart.logNow && canLog;
    button.hidden = !canLog || chart.percent;
    button.setAttribute("aria-pressed", String(log));
    button.onclick = () => { chart.logNow = !chart.logNow; redraw(figure); };

    const quiet = color("--quiet"), grid = { stroke: color("--faint"), width: 1 }, none = { show: false };
    const tell = (u) => {
      const i = u.cursor.idx;
      readout.replaceChildren();
      const add = (text, ink, strong) => {
        const span = document.createElement("span");
        if (ink) { const dot = document.createElement("i"); dot.style.background = ink; span.append(dot); }
        span.append(text);
        if (strong) { const b = document.createElement("b"); b.textContent = strong; span.append(" ", b); }
        readout.append(span);
      };
      const many = lines.length > 1;
      if (i === null || i === undefined) {
        const last = (line) => u.data[line.index].findLast((v) => v !== null);
        const timely = chart.x_title === "step";  // else the last is no better known than the others
        if (many || timely) lines.forEach((line) => add(many ? line.label : "last", many ? line.ink : null, value(chart, last(line))));
        if (chart.band) add(`band: ${chart.band}`);
        if (chart.level) add(`dashed: ${chart.level[1]}, ${value(chart, chart.level[0])}`);
        return;
      }
      const x = u.data[0][i];
      add(`${chart.x_title} ${written(chart.x_title === "step" ? Math.round(x) : x, 4)}`);
      lines.forEach((line) => {
        const v = u.data[line.index][i];
        if (v !== null && v !== undefined) add(many ? line.label : "", many ? line.ink : null, value(chart, v));
      });
      const only = chart.series[0];
      if (!many && only.low) {
        // Of all that lies under the pointer: there may be several values to a pixel.
        const here = (k) => k in chart.x && Math.abs(u.valToPos(chart.x[k], "x") - u.valToPos(x, "x")) < 1;
        const near = [-3, -2, -1, 0, 1, 2, 3].map((d) => i + d).filter(here);
        const low = Math.min(...near.map((k) => only.low[k])), high = Math.max(...near.map((k) => only.high[k]));
        add(`${value(chart, low)} to ${value(chart, high)}`);
      }
      for (const [at, what] of chart.marks) {
        if (Math.abs(u.valToPos(at, "x") - u.valToPos(x, "x")) < 4) add(`${what} at ${written(at)}`);
      }
    };
    const overlay = (u) => {
      const { ctx, bbox } = u, dpr = devicePixelRatio;
      ctx.save();
      ctx.lineWidth = dpr;
      if (chart.level) {
        const y = u.valToPos(chart.level[0], "y", true);
        ctx.strokeStyle = color("--quiet");
        ctx.setLineDash([4 * dpr, 4 * dpr]);
        ctx.beginPath(); ctx.moveTo(bbox.left, y); ctx.lineTo(bbox.left + bbox.width, y); ctx.stroke();
      }
      ctx.setLineDash([2 * dpr, 3 * dpr]);
      ctx.strokeStyle = color("--bad");
      for (const [at] of chart.marks) {
        const x = u.valToPos(at, "x", true);
        if (x < bbox.left || x > bbox.left + bbox.width) continue;
        ctx.beginPath(); ctx.moveTo(x, bbox.top); ctx.lineTo(x, bbox.top + bbox.height); ctx.stroke();
      }
      ctx.restore();
    };
    // A little air above and below; what there is to reach is in sight.
    const range = (u, low, high) => {
      if (low === null) return [0, 1];
      if (chart.level) { low = Math.min(low, chart.level[0]); high = Math.max(high, chart.level[0]); }
      if (log) { const air = Math.max(1.05, (high / low) ** 0.06); return [low / air, high * air]; }
      const air = (high - low || Math.abs(high) || 1) * 0.08;
      let [from, to] = [low - air, high + air];
      if (low >= 0 && low < 0.4 * high) from = 0;
      if (chart.percent) {
        from = Math.max(0, from);
        to = high <= 1 ? Math.min(1.002, Math.max(to, from + 0.002)) : to;
      }
      return [from, to];
    };
    const inside = (u, low, high) => {
      if (low === high) return [low - 1, high + 1];
      if (chart.dots && chart.x.length < 40 && !chart.x_log) { const air = 0.03 * (high - low); return [low - air, high + air]; }
      return [low, high];
    };
    const plot = new uPlot({
      width: holder.clientWidth,
      height: holder.clientHeight,
      series, bands,
      legend: none,
      cursor: { y: false, points: { size: 7 }, drag: { x: true, y: false }, sync: figure.dataset.section === "training" ? { key: "step" } : undefined },
      scales: {
        x: { time: false, distr: chart.x_log ? 3 : 1, ...(chart.x_log ? {} : { range: inside }) },
        y: { distr: log ? 3 : 1, range },
      },
      axes: [
        {
          stroke: quiet, font: FONT, grid: none, ticks: { ...grid, size: 4 }, size: 26, gap: 4, values: ticks(null),
          ...(chart.x_log ? { filter: logMarks("x") } : {}),
          ...(chart.x_title === "guidance" && chart.x.length < 12 ? { splits: () => chart.x } : {}),
        },
        {
          stroke: quiet, font: FONT, ticks: none, size: 54, gap: 6, values: ticks(chart),
          grid: log ? { ...grid, filter: logMarks("y") } : grid,
          ...(log ? { filter: logMarks("y") } : {}),
        },
      ],
      hooks: { setCursor: [tell], draw: [overlay] },
    }, columns, holder);
    tell(plot);
    drawn.push({ figure, plot });
  }

  function redraw(figure) {
    const at = drawn.findIndex((one) => one.figure === figure);
    if (at >= 0) drawn.splice(at, 1)[0].plot.destroy();
    draw(figure);
  }
  const figures = [...document.querySelectorAll(".chart")];
  const redrawAll = () => figures.forEach(redraw);
  figures.forEach(draw);
  new ResizeObserver(() => drawn.forEach(({ figure, plot }) => {
    const width = figure.querySelector(".canvas").clientWidth;
    if (width && Math.abs(width - plot.width) > 1) plot.setSize({ width, height: plot.height });
  })).observe(document.querySelector("main"));

  // Colours: the system's, until somebody chooses.
  const theme = document.getElementById("theme");
  const choices = [["", "◐", "as the system has them"], ["light", "☀", "light"], ["dark", "☾", "dark"]];
  const stored = (() => { try { return localStorage.getItem("report-theme") || ""; } catch { return ""; } })();
  let choice = Math.max(0, choices.findIndex(([name]) => name === stored));
  const apply = () => {
    const [name, sign, said] = choices[choice];
    if (name) root.dataset.theme = name; else delete root.dataset.theme;
    theme.textContent = sign;
    theme.setAttribute("aria-label", `Colours: ${said}`);
    theme.title = `Colours: ${said}`;
    redrawAll();
  };
  if (choice) apply(); else theme.title = "Colours: as the system has them";
  theme.addEventListener("click", () => {
    choice = (choice + 1) % choices.length;
    try { localStorage.setItem("report-theme", choices[choice][0]); } catch { /* a file that may not keep anything */ }
    apply();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redrawAll);

  // Samples over time.
  const slider = document.getElementById("when");
  if (slider) {
    const frames = [...document.querySelectorAll("#frames img")], said = document.getElementById("at");
    const play = document.getElementById("play");
    let timer = null;
    const show = () => {
      frames.forEach((frame, i) => { frame.hidden = i !== Number(slider.value); });
      said.textContent = `step ${frames[slider.value].dataset.step}`;
      slider.setAttribute("aria-valuetext", said.textContent);
    };
    const stop = () => { clearInterval(timer); timer = null; play.textContent = "▶"; play.setAttribute("aria-label", "Play"); };
    slider.addEventListener("input", () => { stop(); show(); });
    play.addEventListener("click", () => {
      if (timer) return stop();
      play.textContent = "❚❚";
      play.setAttribute("aria-label", "Pause");
      if (Number(slider.value) === frames.length - 1) { slider.value = 0; show(); }
      timer = setInterval(() => {
        if (Number(slider.value) === frames.length - 1) return stop();
        slider.value = Number(slider.value) + 1;
        show();
      }, 700);
    });
    show();
  }
})();
