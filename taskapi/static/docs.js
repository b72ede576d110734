// Sets up Swagger UI on its page. A token that is pasted under "Authorize" is kept in the page's memory only.
const dark = matchMedia("(prefers-color-scheme: dark)");
const follow = () => document.documentElement.classList.toggle("dark-mode", dark.matches);
dark.addEventListener("change", follow);
follow();

SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#docs",
  validatorUrl: null, // the default sends the document to another host
  persistAuthorization: false,
  deepLinking: true,
});
