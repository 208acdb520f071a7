// echo.js HOST PORT
require('net')
  .createServer({ allowHalfOpen: true, noDelay: true }, (socket) => socket.pipe(socket))
  .listen(Number(process.argv[3]), process.argv[2]);
