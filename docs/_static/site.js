// Each figure that code has drawn opens alone, and can be taken as the file it is.
document.querySelectorAll(".cell_output img").forEach((image) => {
  const open = document.createElement("a");
  open.href = image.src;
  image.replaceWith(open);
  open.append(image);
  const take = document.createElement("a");
  take.className = "take-figure";
  take.href = image.src;
  take.download = "";
  take.textContent = image.src.split(".").pop().toUpperCase();
  take.setAttribute("aria-label", "Download this figure: " + image.alt);
  open.after(take);
});
