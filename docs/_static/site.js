// Each figure that code has drawn can be taken as the file that is shown.
document.querySelectorAll(".cell_output img").forEach((image) => {
  const link = document.createElement("a");
  link.className = "take-figure";
  link.href = image.src;
  link.download = "";
  link.textContent = image.src.split(".").pop().toUpperCase();
  link.setAttribute("aria-label", "Download this figure: " + image.alt);
  image.after(link);
});
