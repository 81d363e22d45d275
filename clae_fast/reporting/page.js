"use strict";
(() => {
  const plots = JSON.parse(document.getElementById("plots").textContent);
  const root = document.documentElement;
  const tip = document.getElementById("tip");
  const themeButton = document.getElementById("theme");

  const color = (name) => getComputedStyle(root).getPropertyValue(`--${name}`).trim();

  // a plot in the colors of the theme, and as high as its place is wide where it has an aspect
  function themed(id) {
    const { data, layout } = structuredClone(plots[id]);
    const place = document.getElementById(id);
    const meta = layout.meta || {};
    const narrow = place.clientWidth < 480;
    for (const trace of data) {
      if (trace.meta) {
        const own = color(`c${trace.meta.color}`);
        trace.marker = { ...trace.marker, color: own };
        trace.line = { ...trace.line, color: own, width: 2 };
        if (trace.fill) trace.fillcolor = `${own}22`;
      }
    }
    const axis = {
      gridcolor: color("rule"), linecolor: color("rule"), zerolinecolor: color("rule"),
      automargin: true, title: { font: { size: 13 }, standoff: 8 },
    };
    const axes = { xaxis: { ...axis, ...layout.xaxis }, yaxis: { ...axis, ...layout.yaxis } };
    for (const key of ["xaxis", "yaxis"]) {
      axes[key].title = { ...axis.title, ...(layout[key] || {}).title };
    }
    const margin = meta.grid ? { l: 8, r: 8, t: 24, b: 8 } : { l: 56, r: 12, t: 12, b: 44 };
    let height = meta.height || 320;
    if (meta.grid) {
      // the names of rows, which automargin makes room for
      const names = Math.max(...axes.yaxis.ticktext.map((text) => text.length));
      height = (place.clientWidth - 7 * names - 24) * meta.aspect + 40;
    } else if (meta.aspect) {
      height = Math.max(360, place.clientWidth * meta.aspect);
    }
    const shapes = (layout.shapes || []).map((shape) => ({
      ...shape, line: { ...shape.line, color: color("c1") },
    }));
    return {
      data,
      layout: {
        hovermode: "x unified",
        ...layout,
        ...axes,
        template: {},
        shapes,
        height,
        margin,
        autosize: true,
        paper_bgcolor: color("surface"),
        plot_bgcolor: color("surface"),
        font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: color("ink") },
        hoverlabel: {
          bgcolor: color("surface"), bordercolor: color("rule"), font: { color: color("ink") },
        },
        legend: {
          orientation: "h", x: 0, y: 1.02, yanchor: "bottom", bgcolor: "rgba(0,0,0,0)",
          font: { size: narrow ? 11 : 12 }, itemsizing: "constant",
        },
      },
    };
  }

  async function draw(id) {
    const place = document.getElementById(id);
    const { data, layout } = themed(id);
    const first = !place.data;
    await Plotly.react(place, data, layout, { displayModeBar: false, responsive: false });
    if (first && (layout.meta || {}).sprite) {
      place.on("plotly_hover", (event) => show(event, layout.meta.sprite));
      place.on("plotly_unhover", () => { tip.hidden = true; });
    }
  }

  // hidden ones have no width; they are drawn when they are shown
  const visible = () => Object.keys(plots).filter((id) => document.getElementById(id).clientWidth);
  const drawAll = () => Promise.all(visible().map(draw));

  function show({ event, points: [point] }, sprite) {
    const [index, name] = point.customdata;
    const [picture, label] = tip.children;
    const column = index % sprite.columns;
    const row = Math.floor(index / sprite.columns);
    const side = 96;
    picture.style.background = `url(${sprite.uri}) ${-column * side}px ${-row * side}px / ` +
      `${sprite.columns * side}px ${sprite.rows * side}px`;
    label.textContent = name;
    tip.hidden = false;
    const left = Math.min(event.clientX + 16, window.innerWidth - tip.offsetWidth - 8);
    const top = Math.min(event.clientY + 16, window.innerHeight - tip.offsetHeight - 8);
    tip.style.left = `${left}px`;
    tip.style.top = `${top}px`;
  }

  function setTheme(theme) {
    root.dataset.theme = theme;
    themeButton.textContent = theme === "dark" ? "Light" : "Dark";
    return drawAll();
  }

  themeButton.addEventListener("click", () => {
    setTheme(root.dataset.theme === "dark" ? "light" : "dark");
  });
  const preferred = window.matchMedia("(prefers-color-scheme: dark)");
  preferred.addEventListener("change", () => setTheme(preferred.matches ? "dark" : "light"));

  for (const button of document.querySelectorAll("[data-run]")) {
    button.addEventListener("click", () => {
      for (const other of document.querySelectorAll("[data-run]")) {
        other.setAttribute("aria-pressed", String(other === button));
      }
      for (const part of document.querySelectorAll("[data-part]")) {
        part.hidden = part.dataset.part !== button.dataset.run;
      }
      drawAll();
    });
  }

  for (const button of document.querySelectorAll("[data-png]")) {
    button.addEventListener("click", () => {
      const id = button.dataset.png;
      const place = document.getElementById(id);
      Plotly.downloadImage(place, {
        format: "png", filename: id, scale: 2, width: place.clientWidth, height: place.clientHeight,
      });
    });
  }

  let pending;
  window.addEventListener("resize", () => {
    clearTimeout(pending);
    pending = setTimeout(drawAll, 100);
  });
  window.addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });

  setTheme(preferred.matches ? "dark" : "light").then(() => { root.dataset.ready = "true"; });
})();
