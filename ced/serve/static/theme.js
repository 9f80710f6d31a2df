/** Light, dark or system theme; the choice is kept in the browser. */

const KEY = "ced-theme";
const NAMES = { auto: "Theme: system", light: "Theme: light", dark: "Theme: dark" };
const dark = matchMedia("(prefers-color-scheme: dark)");

/** The current theme. @returns {"light" | "dark"} */
export function theme() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ?? (dark.matches ? "dark" : "light");
}

/** Make a button switch between the themes; call `onChange` when the theme changes. */
export function setUpTheme(button, onChange) {
  const apply = (name) => {
    if (name === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = name;
    button.textContent = NAMES[name];
    onChange();
  };
  let name = localStorage.getItem(KEY);
  if (!(name in NAMES)) name = "auto";
  button.addEventListener("click", () => {
    const names = Object.keys(NAMES);
    name = names[(names.indexOf(name) + 1) % names.length];
    localStorage.setItem(KEY, name);
    apply(name);
  });
  dark.addEventListener("change", onChange);
  apply(name);
}
