const tip = document.getElementById("tip");
const hideTip = () => { tip.hidden = true; document.querySelectorAll(".lit").forEach(e => e.classList.remove("lit")); };
const showTip = target => {
  hideTip();
  if (!target) return;
  tip.textContent = target.dataset.tip;
  tip.hidden = false;
  const box = target.getClientRects()[0] || target.getBoundingClientRect();
  const left = Math.min(Math.max(10, box.left), innerWidth - tip.offsetWidth - 10);
  const above = box.top - tip.offsetHeight - 9;
  tip.style.left = left + "px";
  tip.style.top = (above > 6 ? above : box.bottom + 9) + "px";
  if (target.dataset.p) document.querySelectorAll('[data-p="' + target.dataset.p + '"]').forEach(e => e.classList.add("lit"));
};
const focused = () => document.activeElement?.dataset.tip === undefined ? null : document.activeElement;
document.addEventListener("pointerover", event => showTip(event.target.closest("[data-tip]") ?? focused()));
document.addEventListener("scroll", () => showTip(focused()), { passive: true, capture: true });
