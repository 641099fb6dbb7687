import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;

/** Requests of java.net.http on a kept connection. argv: host port count. Prints {"ok", "wrong"}. */
class Client {
  public static void main(String[] argv) throws Exception {
    HttpClient client = HttpClient.newBuilder().version(HttpClient.Version.HTTP_1_1).build();
    int ok = 0;
    StringBuilder wrong = new StringBuilder();
    for (int number = 0; number < Integer.parseInt(argv[2]); number++) {
      int size = 10 + number * 37 % 30000;
      String tag = "java-" + ProcessHandle.current().pid() + "-" + number;
      URI uri = URI.create("http://" + argv[0] + ":" + argv[1] + "/size/" + size + "/" + tag);
      HttpResponse<byte[]> answer = client.send(HttpRequest.newBuilder(uri).build(), HttpResponse.BodyHandlers.ofByteArray());
      if (answer.statusCode() == 200 && answer.body().length == size
          && tag.equals(answer.headers().firstValue("x-tag").orElse(""))) ok++;
      else if (wrong.length() < 500) wrong.append(tag).append(' ').append(answer.statusCode()).append(';');
    }
    System.out.println("{\"ok\": " + ok + ", \"wrong\": \"" + wrong + "\"}");
    System.exit(0);
  }
}
