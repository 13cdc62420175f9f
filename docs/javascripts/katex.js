document.addEventListener("DOMContentLoaded", () => {
  if (typeof renderMathInElement === "undefined") return; // the CDN is not reachable: the formulas stay as LaTeX
  renderMathInElement(document.body, {
    delimiters: [
      { left: "\\[", right: "\\]", display: true },
      { left: "\\(", right: "\\)", display: false },
    ],
  });
});
