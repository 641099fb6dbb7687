import com.sun.net.httpserver.HttpServer;
import java.net.InetSocketAddress;
import java.util.concurrent.Executors;

/** The JDK's own server. argv: port. */
class Server {
  public static void main(String[] argv) throws Exception {
    HttpServer server = HttpServer.create(new InetSocketAddress("::", Integer.parseInt(argv[0])), 64);
    server.createContext("/", exchange -> {
      byte[] asked = exchange.getRequestBody().readAllBytes();
      String[] parts = exchange.getRequestURI().getPath().split("/");
      byte[] body = exchange.getRequestMethod().equals("POST") ? String.valueOf(asked.length).getBytes()
          : "x".repeat(parts.length > 2 ? Integer.parseInt(parts[2]) : 2).getBytes();
      exchange.getResponseHeaders().set("X-Tag", parts[parts.length - 1]);
      exchange.sendResponseHeaders(200, body.length);
      exchange.getResponseBody().write(body);
      exchange.close();
    });
    server.setExecutor(Executors.newFixedThreadPool(4));
    server.start();
  }
}
