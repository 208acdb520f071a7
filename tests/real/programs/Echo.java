import java.net.InetSocketAddress;
import java.net.StandardSocketOptions;
import java.nio.ByteBuffer;
import java.nio.channels.SelectionKey;
import java.nio.channels.Selector;
import java.nio.channels.ServerSocketChannel;
import java.nio.channels.SocketChannel;

/** Echo HOST PORT: one thread, non-blocking channels, a selector. */
public class Echo {
    /** What a connection has received and not yet sent, and whether more is to come. */
    private static final class Guest {
        final ByteBuffer buffer = ByteBuffer.allocateDirect(1 << 16);
        boolean ended;
    }

    public static void main(String[] args) throws Exception {
        Selector selector = Selector.open();
        ServerSocketChannel server = ServerSocketChannel.open();
        server.setOption(StandardSocketOptions.SO_REUSEADDR, true);
        server.bind(new InetSocketAddress(args[0], Integer.parseInt(args[1])));
        server.configureBlocking(false);
        server.register(selector, SelectionKey.OP_ACCEPT);
        while (true) {
            selector.select();
            for (SelectionKey key : selector.selectedKeys()) {
                if (key.isAcceptable()) {
                    SocketChannel channel = server.accept();
                    channel.configureBlocking(false);
                    channel.setOption(StandardSocketOptions.TCP_NODELAY, true);
                    channel.register(selector, SelectionKey.OP_READ, new Guest());
                } else {
                    serve(key);
                }
            }
            selector.selectedKeys().clear();
        }
    }

    private static void serve(SelectionKey key) throws Exception {
        SocketChannel channel = (SocketChannel) key.channel();
        Guest guest = (Guest) key.attachment();
        if (!guest.ended && channel.read(guest.buffer) < 0) {
            guest.ended = true;
        }
        guest.buffer.flip();
        channel.write(guest.buffer);
        guest.buffer.compact();
        if (guest.ended && guest.buffer.position() == 0) {
            channel.close();
            return;
        }
        boolean room = guest.buffer.hasRemaining() && !guest.ended;
        boolean waiting = guest.buffer.position() > 0;
        key.interestOps((room ? SelectionKey.OP_READ : 0) | (waiting ? SelectionKey.OP_WRITE : 0));
    }
}
