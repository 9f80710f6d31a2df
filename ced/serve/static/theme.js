/** Light, dark, or as the system has it; the choice is kept in this browser. */

const KEY = "ced-theme";
const NAMES = { auto: "Theme: system", light: "Theme: light", dark: "Theme: dark" };
const dark = matchMedia("(prefers-color-scheme: dark)");

/** The theme that is in force. @returns {"light" | "dark"} */
export function theme() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ?? (dark.matches ? "dark" : "light");
}

/** Let a button go through the themes; call `onChange` when another is in force. */
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
