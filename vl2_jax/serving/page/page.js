() => {
  // Dark or light: as the reader's system has it, until they choose.
  const kept = localStorage.getItem("vl2-theme");
  if (kept) document.body.classList.toggle("dark", kept === "dark");
  document.getElementById("theme").setAttribute("aria-label", "Dark or light");
  window.vl2SwitchTheme = () => {
    const dark = document.body.classList.toggle("dark");
    localStorage.setItem("vl2-theme", dark ? "dark" : "light");
  };
}
