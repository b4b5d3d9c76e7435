
"use strict";
// Replace each drawing by an interactive one. Without JavaScript, the page keeps the drawings.
for (const drawing of document.querySelectorAll(".drawing")) {
  const number = drawing.id.slice("plot-".length);
  const controls = document.getElementById(`controls-${number}`);
  const spec = JSON.parse(document.getElementById(`spec-${number}`).textContent);
  const canvas = drawing.firstElementChild; // Vega gives its container a role and a name of its own
  const still = canvas.firstElementChild;
  drawing.style.minHeight = `${drawing.clientHeight}px`; // the page does not jump while a drawing is replaced
  window.vegaEmbed(canvas, spec, { mode: "vega", renderer: "svg", actions: false, defaultStyle: false, bind: controls })
    .then(({ view }) => {
      drawing.style.minHeight = "";
      if (!controls.firstElementChild) return;
      controls.setAttribute("role", "group");
      controls.setAttribute("aria-label", `Range of ${drawing.previousElementSibling.textContent}`);
      enableDragging(drawing, view);
    }, (error) => {
      canvas.replaceChildren(still);
      console.error(error);
    });
}

// Only tables that are wider than their place can be scrolled, so only these are reached by the keyboard.
const sizes = new ResizeObserver((entries) => {
  for (const { target } of entries) target.tabIndex = target.scrollWidth > target.clientWidth ? 0 : -1;
});
for (const place of document.querySelectorAll(".scroll, pre")) sizes.observe(place);

// A print has the text of all closed parts, except the tables of plots and tokens.
const closed = () => document.querySelectorAll("main details:not([open], figure details, .tokens details)");
let opened = [];
window.addEventListener("beforeprint", () => {
  opened = [...closed()];
  for (const part of opened) part.open = true;
});
window.addEventListener("afterprint", () => {
  for (const part of opened) part.open = false;
});

// Dragging with a mouse selects a range of the horizontal axis, and a double click selects all of it.
function enableDragging(drawing, view) {
  const whole = ["low", "high"].map((name) => view.signal(name));
  const select = ([low, high]) => view.signal("low", low).signal("high", high).runAsync();
  const at = (event) => {
    const left = drawing.querySelector("svg").getBoundingClientRect().left + view.origin()[0];
    const position = Math.min(Math.max(event.clientX - left, 0), view.signal("width"));
    return Math.round(view.scale("x").invert(position));
  };
  let from = null;
  drawing.addEventListener("pointerdown", (event) => {
    if (event.pointerType !== "mouse" || event.button !== 0) return;
    event.preventDefault();
    from = at(event);
    drawing.setPointerCapture(event.pointerId);
  });
  drawing.addEventListener("pointerup", (event) => {
    if (from === null) return;
    const ends = [from, at(event)].sort((a, b) => a - b);
    from = null;
    if (ends[1] > ends[0]) select(ends);
  });
  drawing.addEventListener("dblclick", () => select(whole));
}
