// What require() gets: the library itself, which every Node from 20.19 on can require.
module.exports = require("./imgpull.mjs");
